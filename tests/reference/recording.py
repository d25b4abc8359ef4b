"""What the recording scripts ask of a transformers model; everything is float32 on the CPU."""

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel


@torch.inference_mode()
def all_logits(model: PreTrainedModel, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits (len(ids), vocabulary) of one pass over `ids`."""
    return model(torch.from_numpy(ids).long()[None]).logits[0].numpy()


def greedy(model: PreTrainedModel, ids: NDArray[np.int32], stops: list[int]) -> NDArray[np.int32]:
    """The 40 most likely ids after `ids`, fewer if one of `stops` is among them: it is then the last."""
    prompt = torch.from_numpy(ids).long()[None]
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=stops
    )
    return made[0, len(ids) :].numpy().astype(np.int32)


def tops(logits: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """Of each row its 32 highest logits, in falling order, their ids, and the log of the sum of exponentials."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :32].astype(np.int32)
    return {
        "top32_ids": ids,
        "top32_logits": np.take_along_axis(logits, ids, axis=1),
        "logsumexp": torch.from_numpy(logits).double().logsumexp(dim=1).float().numpy(),
    }
