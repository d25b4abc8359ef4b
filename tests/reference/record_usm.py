"""Records what transformers makes of the small audio encoder of usm.py, in float32.

python -m pip install --editable . --group test --group reference
python -m tests.reference.record_usm

Writes usm.npz next to this file. For each of the LENGTHS of usm.py, `encoded_<frames>` are the frames that are left
of a sound, float32 (tokens, 96), and `features_<frames>` the embeddings of all 12 tokens, float32 (12, 96), filled up
as Gemma3nModel.forward does it. `hard` are the embeddings of the encoder's own ids, float32 (5, 96). It prints how
much each trap shows in the features of the longest sound.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Gemma3nAudioConfig, Gemma3nTextConfig
from transformers.models.gemma3n import modeling_gemma3n as source

from tests.reference.usm import CONFIG, HF, LENGTHS, TEXT_HIDDEN, sound, weights


@torch.inference_mode()
def main() -> None:
    config = Gemma3nAudioConfig(**HF["audio_config"])
    tower = source.Gemma3nAudioEncoder(config).eval()
    embedder = source.Gemma3nMultimodalEmbedder(config, Gemma3nTextConfig(hidden_size=TEXT_HIDDEN)).eval()
    tensors = {name: torch.from_numpy(values) for name, values in weights().items()}
    for module, prefix in ((tower, "model.audio_tower."), (embedder, "model.embed_audio.")):
        module.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
    hard = embedder(input_ids=torch.arange(CONFIG.vocab_offset, CONFIG.vocab_offset + CONFIG.vocab_size)).numpy()

    def encoded(frames: int) -> torch.Tensor:
        """Return what the encoder keeps of a sound without padding, which the mask says where it is true."""
        mel = torch.from_numpy(sound(frames))[None]
        out = tower(mel, torch.zeros(mel.shape[:2], dtype=torch.bool), return_dict=True)
        assert not out.audio_mel_mask.any()
        return out.last_hidden_state

    def features(frames: int) -> NDArray[np.float32]:
        own = embedder(inputs_embeds=encoded(frames))[0].numpy()
        return np.concatenate((own, np.repeat(hard[-1:], CONFIG.tokens.count - len(own), axis=0)))

    recorded = {"hard": hard}
    for frames in LENGTHS:
        recorded[f"encoded_{frames}"] = encoded(frames)[0].numpy()
        recorded[f"features_{frames}"] = features(frames)
        print(
            frames, "frames", recorded[f"encoded_{frames}"].shape, "deviation", recorded[f"features_{frames}"].std()
        )
    np.savez_compressed(Path(__file__).with_name("usm.npz"), **recorded)
    longest = LENGTHS[-1]
    for name, undo in traps(tower):
        difference = np.abs(features(longest) - recorded[f"features_{longest}"]).max()
        undo()
        print(f"without {name}: {difference:.3f}")
    assert np.array_equal(features(longest), recorded[f"features_{longest}"])


def traps(tower: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Leave one thing after the other out of an encoder; each comes with what puts it back."""
    modules = list(tower.modules())
    attentions = [module for module in modules if isinstance(module, source.Gemma3nAudioAttention)]
    caps = [module.softcap.clone() for module in attentions]
    for module in attentions:
        module.softcap.fill_(1e9)
    yield "the cap of scores", lambda: [a.softcap.copy_(b) for a, b in zip(attentions, caps, strict=True)]
    masks = [module.local_causal_valid_mask.clone() for module in attentions]
    for module in attentions:
        module.local_causal_valid_mask.fill_(True)
    yield (
        "the local mask",
        lambda: [a.local_causal_valid_mask.copy_(b) for a, b in zip(attentions, masks, strict=True)],
    )
    positions = [module for module in modules if isinstance(module, source.Gemma3nAudioRelativePositionEmbedding)]
    kept = [module.pos_proj.weight.clone() for module in positions]
    for module in positions:
        module.pos_proj.weight.zero_()
    yield "positions", lambda: [a.pos_proj.weight.copy_(b) for a, b in zip(positions, kept, strict=True)]

    def pad(*padding: int) -> None:
        for module in modules:
            if isinstance(module, source.Gemma3nAudioSSCPConvBlock):
                module.manual_padding = padding

    pad(1, 1, 1, 1)
    yield "the padding of time", lambda: pad(1, 1, 0, 2)


if __name__ == "__main__":
    main()
