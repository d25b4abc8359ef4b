"""Records what Hugging Face's `tokenizers` and the published chat template make of Gemma 3 text.

python tests/data/record_tokens.py FOLDER

FOLDER holds the tokenizer.json and tokenizer_config.json of an instruction-tuned Gemma 3 of any size.
Needs `tokenizers` and `jinja2`. Writes tokens.json next to this file.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TEXTS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "  a",
    "   a   b    ",
    "Hello, world!",
    "You are a helpful assistant",
    "Why the sky is blue?",
    "The quick brown fox jumps over the lazy dog.",
    "THE QUICK BROWN FOX",
    "don't can't won't it's I'll we've",
    "naïve café résumé Ångström",
    "cafe\u0301 A\u030angstro\u0308m",
    "co-operate re-enter e-mail, state-of-the-art",
    "1234567890",
    "3.14159265358979 -1e-10 0xDEADBEEF 1,000,000",
    "2026-11-21T04:42:00Z",
    "https://example.org/a/b?c=d&e=%20f#g",
    "user@example.org",
    "snake_case camelCase SCREAMING_CASE kebab-case",
    "Straße Größe Öl Übermut daß",
    "Donaudampfschifffahrtsgesellschaftskapitän",
    "Être ou ne pas être, voilà la question\u00a0!",
    "¿Dónde está la biblioteca? ¡Allí!",
    "Zażółć gęślą jaźń",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Đây là một câu tiếng Việt.",
    "Ünlü Türkçe İstanbul ığdır",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "שלום עולם",
    "שָׁלוֹם",
    "مرحبا بالعالم",
    "السَّلامُ عَلَيْكُم",
    "سلام دنیا\u200cها",
    "नमस्ते दुनिया",
    "दिलाई क्षत्रिय श्री",
    "হ্যালো বিশ্ব",
    "வணக்கம் உலகம்",
    "హలో ప్రపంచం",
    "ഹലോ ലോകം",
    "สวัสดีชาวโลก",
    "ສະບາຍດີ",
    "မင်္ဂလာပါ",
    "សួស្តី​ពិភពលោក",
    "ሰላም ልዑል",
    "გამარჯობა მსოფლიო",
    "Բարեւ աշխարհ",
    "你好，世界！",
    "繁體中文與简体中文",
    "こんにちは世界。カタカナとひらがな",
    "ﾊﾝｶｸ ｶﾀｶﾅ　全角スペース",
    "안녕하세요 세계",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    "ᚠᛇᚻ᛫ᛒᛦᚦ",
    "𐎠𐎡𐎢 𓀀𓀁 𒀀𒀁",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒻𝓊𝓃",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β)",
    "😀😃😄",
    "👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇪🇺🇩🇪 1️⃣",
    "🫨🪿\U0001fae9",
    "\U000e0001\U000e007f",
    "\ufeffBOM",
    "\ufffd\ufffe",
    "a\u200bb\u200cc\u200dd\u2060e",
    "\u202eright to left\u202c",
    "\x00\x01\x02\x7f\x80\x9f",
    "\r\n\r\n",
    "\r",
    "\v\f\x85\u2028\u2029",
    "tab\tseparated\tvalues",
    "\t",
    "\t\t\t\tindented",
    "\n",
    "\n\n",
    "line one\nline two\n\nline four\n",
    "\n \n  \n",
    "a\n" * 5,
    "\n" * 31,
    "\n" * 32,
    "\n" * 100,
    "\t" * 33,
    " " * 31,
    " " * 32,
    " " * 100 + "x",
    " \t \n \t\n\n  \t\t",
    "▁",
    "▁▁",
    " ▁ ▁▁ ▁▁▁a",
    "▁" * 40,
    "a▁b▁▁c",
    "def f(x):\n    if x > 0:\n        return x ** 2\n\n    return -x\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }",
    "SELECT * FROM t WHERE a <> 'b' AND c >= 10;",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "# Title\n\n- **bold** and *italic*\n- `code`\n\n```python\nprint(1)\n```\n",
    "<table><tr><td>cell</td></tr></table>",
    "<html><body><h1>Title</h1><p>text</p></body></html>",
    "<b>bold</b> <B>BOLD</B> < b > <b<b>b>",
    "a > </b> > <c>  </d>",
    "> </ > </> </",
    "<strong></strong><em>x</em><blockquote>",
    "<bos>",
    "<bos>Hello",
    "<bos><bos>",
    " <bos>",
    "Hello<eos>",
    "<pad><unk><mask>[multimodal]",
    "<unused0><unused98><unused99><unused6241><unused6242>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<end_of_turn>",
    "<end_of_turn",
    "end_of_turn>",
    "<end_of_turn><end_of_turn>\n<b>",
    "<<end_of_turn>>",
    "< end_of_turn> <End_Of_Turn> <end_of_turn >",
    "<start_of_<eos>turn>",
    "<start_of_image><end_of_image>",
    "<0x41><0xFF><0x0A>",
    "<s>[INST] x [/INST]</s>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "-" * 80 + "=" * 80 + "." * 80,
    "hahahahahahaha ooooooooh!!!!!!!! ??!?!?",
    "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogoch",
    "ACGTACGTTAGCCGATCGATCGGATATCGCGC",
    "dGhlIHF1aWNrIGJyb3duIGZveA==",
    "quorum qu orum q u o r u m",
]

IDS = [
    [],
    [2],
    [2, 9259, 235341],
    [138, 139, 140],
    [107, 108, 255968],
    [236743, 236743],
    [238 + byte for byte in "é€😀".encode()],
    [238 + byte for byte in b"\xe2\x82"],
    [238 + byte for byte in b"\xe2\x82\xac\xff"],
    [238 + byte for byte in b"\xff\xe2\x82\xac"],
    [238 + byte for byte in b"ab\x80c"],
    [238 + 0xE2, 238 + 0x82, 9259, 238 + 0xAC],
    [238 + 0xE2, 238 + 0x82, 106, 238 + 0xAC, 107],
    [238 + 0xED, 238 + 0xA0, 238 + 0x80],
    [238 + 0xF4, 238 + 0x90, 238 + 0x80, 238 + 0x80],
    [238 + 0xC0, 238 + 0x80],
    [238, 107, 238 + 10],
    [2, 105, 2364, 107, 9259, 106, 107, 105, 4368, 107],
    [0, 1, 2, 3, 4, 5, 6, 255999, 256000, 262143],
]


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def system(content: object) -> dict[str, object]:
    return {"role": "system", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


CHATS = [
    [system("You are a helpful assistant"), user("Why the sky is blue?")],
    [user("Hi")],
    [user("")],
    [user("  \n\t Hi there \n\n")],
    [user("\u00a0\u2003x\u200b\u3000")],
    [user("Hi"), assistant("Hello! "), user("Bye")],
    [user("Hi"), assistant("\nHello!\n")],
    [system("  Be brief. \n"), user("\nHi\n"), assistant("Hello"), user("What is 2 + 2?")],
    [system(""), user("Hi")],
    [system("\n\n"), user("")],
    [system([part(" Be brief. ")]), user([part(" one "), part(" two ")])],
    [user([part("")])],
    [user([])],
    [user("def f():\n\n\n    return 1\n\n"), assistant("```\n\tx\n```"), user("<b>why</b>\n\n\n\nreally?")],
    [user("model\n"), assistant("user\n"), user("<end_of_turn"), assistant("start_of_turn>"), user("▁▁ ▁")],
    [system("日本語で答えて"), user("空はなぜ青い？ 😀\U0001fae9")],
]


def canonical(value: object) -> str:
    """Return the SHA-256 of `value` as compact JSON in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """Return what a tokenizer.json says of its first `size` ids: small items as they are, large ones hashed."""
    model = dict(tokenizer["model"])
    pieces = {token: piece for piece, token in model.pop("vocab").items()}
    merges = model.pop("merges")
    added = [entry for entry in tokenizer["added_tokens"] if entry["id"] < size]
    return {
        "pieces": canonical([pieces.get(token) for token in range(size)]),
        "merges": canonical(merges),
        "merge_count": len(merges),
        "added": canonical(sorted(sorted(entry.items()) for entry in added)),
        "added_count": len(added),
        "model": model,
        **{key: tokenizer[key] for key in ("normalizer", "pre_tokenizer", "decoder")},
    }


def main(folder: Path) -> None:
    import jinja2.sandbox
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))

    def encode(text: str, control: bool) -> list[int]:
        tokenizer.encode_special_tokens = not control
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = environment.from_string(config["chat_template"])
    chats = []
    for messages in CHATS:
        for prompt in (True, False):
            text = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=prompt)
            chats.append({"messages": messages, "prompt": prompt, "text": text, "ids": encode(text, control=True)})
    golden = {
        "tokenizer": [fingerprint(json.loads(path.read_text(encoding="utf-8")), 262144)],
        "texts": [{"text": text, "ids": encode(text, True), "plain_ids": encode(text, False)} for text in TEXTS],
        "decoded": [
            {
                "ids": ids,
                "text": tokenizer.decode(ids, skip_special_tokens=False),
                "plain_text": tokenizer.decode(ids, skip_special_tokens=True),
            }
            for ids in IDS
        ],
        "chats": chats,
    }
    sections = [
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(entry) for entry in entries) + "\n ]"
        for name, entries in golden.items()
    ]
    target = Path(__file__).with_name("tokens.json")
    target.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
