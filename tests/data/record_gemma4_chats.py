"""Records what the chat template that is published with Gemma 4 E2B makes of chats with tools and thoughts.

python tests/data/record_gemma4_chats.py TEMPLATE

TEMPLATE is the chat_template.jinja of google/gemma-4-E2B-it (9 July 2026). Needs `jinja2`. Writes gemma4_chats.json
next to this file.
"""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

Message = dict[str, object]


def system(content: object) -> Message:
    return {"role": "system", "content": content}


def user(content: object) -> Message:
    return {"role": "user", "content": content}


def assistant(content: object, **others: object) -> Message:
    return {"role": "assistant", "content": content, **others}


def result(content: object, **others: object) -> Message:
    return {"role": "tool", "content": content, **others}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def call(name: str, arguments: object = None, id_: str | None = None) -> dict[str, object]:
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function, **({"id": id_} if id_ else {})}


def tool(name: str, description: str | None = None, parameters: object = None, **others: object) -> dict[str, Any]:
    function: dict[str, object] = {"name": name, **others}
    function |= {"description": description} if description is not None else {}
    function |= {"parameters": parameters} if parameters is not None else {}
    return {"type": "function", "function": function}


def schema(properties: object, *required: str, **others: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        **({"required": list(required)} if required else {}),
        **others,
    }


TEXT, NUMBER = {"type": "string"}, {"type": "number"}
WEATHER = tool(
    "get_weather",
    "Get the weather of a place.",
    schema(
        {
            "city": {"type": "string", "description": 'Its name, as "Paris".'},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "description": "The unit."},
        },
        "city",
    ),
)
ORDER = tool(
    "place_order",
    "Place an order.",
    schema(
        {
            "Zip": {"type": "integer", "nullable": True},
            "amount": {"type": "number", "description": "How many.", "nullable": True},
            "address": {
                "type": "object",
                "description": "Where it goes.",
                "properties": {"street": TEXT, "type": {"type": "string", "enum": ["home", "work"]}},
                "required": ["street"],
            },
            "items": {
                "type": "array",
                "description": "What is ordered.",
                "items": {
                    "type": "object",
                    "description": "An item.",
                    "properties": {"sku": TEXT, "tags": {"type": "array", "items": TEXT}},
                    "required": ["sku", "tags"],
                },
            },
            "matrix": {"type": "array", "items": {"type": "array", "items": NUMBER}},
            "either": {"type": "array", "items": {"type": ["string", "null"], "enum": ["a", None, 1, 2.5, True]}},
            "gift": {"type": "boolean"},
            "plain": {"type": "array"},
            "untyped": {"description": "It may be anything."},
            "optional": {"type": ["string", "null"], "description": "It may be missing."},
        },
        "items",
        "address",
    ),
)
BARE = [
    tool("ping"),
    tool("pong", "Answer."),
    tool("none", "It takes nothing.", {"type": "object", "properties": {}}),
    tool(
        "typed",
        "It says what it returns.",
        {"type": "OBJECT"},
        response={"type": "object", "description": "The time."},
    ),
    tool("silent", "It returns something.", response={"type": "object"}),
    tool(
        "loose",
        "Objects without properties of their own.",
        schema(
            {
                "description": {"type": "string", "description": "A parameter of this name."},
                "open": {"type": "object", "additionalProperties": False, "title": "Open"},
                "bare": {"type": "object"},
                "nested": {"type": "object", "inner": {"type": "string"}, "required": ["inner"]},
            }
        ),
    ),
]
ASKED = [user("Weather in Paris?"), assistant("", tool_calls=[call("get_weather", {"city": "Paris"}, "1")])]
ARGUMENTS = {
    "text": 'He said "hi", {a: [1]}',
    "empty": "",
    "n": 3,
    "x": -1.5e-7,
    "big": 1e22,
    "yes": True,
    "no": False,
    "nothing": None,
    "list": [1, "two", [3.0, None], {"b": 1, "A": {"deep": "x"}}],
    "map": {"z": [], "Y": {}, "a": "\n"},
    "Upper": "é😀",
}

# (messages, tools, thinking)
CHATS: list[tuple[list[Message], list[dict[str, Any]], bool | None]] = [
    ([user("Hi")], [], None),
    ([user("Hi")], [], False),
    ([user("Hi")], [], True),
    ([system("Be brief."), user("Hi")], [], None),
    ([system(" Be brief.\n"), user("\n\tHi \u00a0")], [], True),
    ([system(""), user("")], [], None),
    ([system([part(" Be brief. "), part("Be kind.")]), user([part(" one "), part(" two")])], [], None),
    ([user([]), assistant(""), user([part("")])], [], True),
    ([user("Hi"), assistant(" Hello!\n"), user("Bye")], [], None),
    ([user("Hi"), assistant("Hello!")], [], None),
    ([user("日本語 😀\u200d"), assistant("¿Sí? ▁▁"), user("<b>why</b>\n\n\n\nreally?\n")], [], True),
    ([user("Hi"), assistant("<|channel>thought\nHm.\n<channel|>Hello"), user("And?")], [], True),
    (
        [user("Hi"), assistant("A<|channel>thought\nB<channel|> C <|channel>thought\nD<channel|>"), user("E")],
        [],
        None,
    ),
    ([user("Hi"), assistant("Hello<|channel>thought\nand no end"), user("?")], [], None),
    ([user("1"), assistant("2", reasoning_content="Old."), user("3"), assistant("4", reasoning="New.")], [], True),
    ([user("1"), user("2"), assistant("3"), assistant("4"), user("5")], [], None),
    ([assistant("Welcome."), user("Hi")], [], None),
    ([user("Weather in Paris?")], [WEATHER], None),
    ([system("You help."), user("Weather in Paris?")], [WEATHER], True),
    ([user("Order it.")], [WEATHER, ORDER], False),
    ([system("x"), user("Hi")], BARE, True),
    ([*ASKED], [WEATHER], None),
    ([*ASKED, result('{"celsius": 21}', tool_call_id="1")], [WEATHER], None),
    ([*ASKED, result('{"celsius": 21}', tool_call_id="1")], [WEATHER], True),
    ([*ASKED, result({"celsius": 21, "Sky": ["clear", None]}, tool_call_id="2", name="sky")], [WEATHER], None),
    ([*ASKED, result([part("It is "), part(" warm.")])], [WEATHER], None),
    ([*ASKED, result(None, tool_call_id="1"), assistant("It is warm."), user("Thanks")], [WEATHER], None),
    ([*ASKED, result("21", tool_call_id="1"), user("And in Rome?")], [WEATHER], None),
    (
        [
            user("Both"),
            assistant(
                None,
                tool_calls=[call("a", ARGUMENTS, "1"), call("b", {}, "2"), call("c", None, "3")],
                reasoning_content="Two\n places.",
            ),
            result("one", tool_call_id="2"),
            result(2.5, tool_call_id="1"),
            result(True, tool_call_id="3"),
        ],
        [WEATHER],
        True,
    ),
    (
        [
            system("s"),
            user("u"),
            assistant("First, a.", tool_calls=[call("a", {"n": 1}, "1")], reasoning="I need a."),
            result("A", tool_call_id="1"),
            assistant("", tool_calls=[call("b", {"n": 2}, "2")], reasoning="Now b."),
            result("B", tool_call_id="2"),
            assistant("Done."),
            user("And c?"),
            assistant("", tool_calls=[call("c", {"n": 3}, "3")], reasoning="Now c."),
            result("C", tool_call_id="3"),
        ],
        [tool("a"), tool("b"), tool("c")],
        True,
    ),
    ([*ASKED, user("Never mind.")], [WEATHER], None),
    ([*ASKED, assistant("Wait."), assistant("", tool_calls=[call("get_weather", {"city": "Rome"})])], [], None),
    ([user("x"), assistant(" ", tool_calls=[call("f", {})]), result("y"), assistant("z")], [], True),
    ([user("model\n"), assistant("user\n"), user("<|turn"), assistant("turn|>"), user("<|turn >")], [], None),
]


def as_published(messages: list[Message]) -> list[Message]:
    """Return messages in which a tool's object stands where the template looks for one: in the message that calls."""
    given: list[Any] = []
    for message in messages:
        if message["role"] == "tool" and isinstance(message["content"], dict):
            found = {"name": message["name"], "response": message["content"]}
            given[-1] = {**given[-1], "tool_responses": [*given[-1].get("tool_responses", []), found]}
        else:
            given.append(message)
    return given


def main(path: Path) -> None:
    import jinja2.sandbox

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    # So does `apply_chat_template` of transformers.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(path.read_text(encoding="utf-8"))
    cases = []
    for messages, tools, thinking in CHATS:
        given: dict[str, Any] = {"messages": as_published(messages), "tools": tools}
        given |= {} if thinking is None else {"enable_thinking": thinking}
        texts = [
            template.render(**given, bos_token="<bos>", add_generation_prompt=prompt) for prompt in (False, True)
        ]
        assert texts[1].startswith(texts[0])
        cases.append(
            {
                "messages": messages,
                "tools": tools,
                "thinking": thinking,
                "text": texts[0],
                "reply": texts[1].removeprefix(texts[0]),
            }
        )
    lines = ",\n ".join(json.dumps(case) for case in cases)
    Path(__file__).with_name("gemma4_chats.json").write_text(f"[\n {lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
