"""A Modelfile for Ollama beside a GGUF file: the file, how an answer ends, and the chat template in Go's syntax.

Ollama recognizes only the chat templates that it knows. So the template is derived by rendering conversations with
marked texts and cutting the results at the marks; it is left out where these pieces do not reproduce the renderings.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

_SYSTEM, _USER, _ASSISTANT, _AGAIN = ("\x02s\x03", "\x02u\x03", "\x02a\x03", "\x02v\x03")


class _Pieces(NamedTuple):
    """What a template writes around the texts of a conversation."""

    system: str | None  # before the system text; None: the template has no system role
    system_end: str
    user: str  # before the user's text
    answer: str  # between the user's text and the answer
    answer_end: str
    default_system: str  # the system text if there is none


def modelfile(tokenizer: Any, model_file: str, end_ids: Sequence[int] = (), adapter_file: str | None = None) -> str:
    """The text of a Modelfile; file names are relative to it.

    ``tokenizer`` is that of transformers; ``end_ids`` are tokens that end an answer.
    """
    lines = [f"FROM ./{model_file}"]
    if adapter_file is not None:
        lines.append(f"ADAPTER ./{adapter_file}")
    pieces = _pieces(tokenizer)
    if pieces is not None:
        system = ""
        if pieces.system is not None:
            system = f"{{{{ if .System }}}}{pieces.system}{{{{ .System }}}}{pieces.system_end}{{{{ end }}}}"
        if pieces.default_system:
            lines.append(f'SYSTEM """{pieces.default_system}"""')
        turn = f"{pieces.user}{{{{ .Prompt }}}}{pieces.answer}{{{{ .Response }}}}{pieces.answer_end}"
        lines.append(f'TEMPLATE """{system}{turn}"""')
    elif tokenizer.chat_template:
        lines.append("# The chat template has no equivalent here: Ollama uses the one that it finds in the file.")
    stops = dict.fromkeys([tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list(end_ids))])
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop]
    return "\n".join(lines) + "\n"


def _pieces(tokenizer: Any) -> _Pieces | None:
    """The pieces, or None if the template is not made of them."""
    alone = _render(tokenizer, ("user", _USER))
    turns = _render(tokenizer, ("user", _USER), ("assistant", _ASSISTANT), ("user", _AGAIN))
    told = _render(tokenizer, ("system", _SYSTEM), ("user", _USER))
    if not all(_USER in text for text in (alone, turns)) or _AGAIN not in turns.rpartition(_ASSISTANT)[2]:
        return None
    start, _, answer = alone.partition(_USER)
    between = turns.partition(_ASSISTANT)[2].partition(_AGAIN)[0]
    user = _common_end(start, between)
    system, system_end = None, ""
    if told.find(_SYSTEM) in range(max(told.find(_USER), 0)):
        system, _, rest = told.partition(_SYSTEM)
        middle = rest.partition(_USER)[0]
        user = _common_end(user, middle)
        system_end = middle.removesuffix(user)
        if rest != f"{middle}{_USER}{answer}":
            return None
    default = ""
    if start != user:
        frame = (system or "", system_end + user)
        if system is None or not (start.startswith(frame[0]) and start.endswith(frame[1])):
            return None
        default = start[len(frame[0]) : len(start) - len(frame[1])]
    answer_end = between.removesuffix(user)
    pieces = _Pieces(system, system_end, user, answer, answer_end, default)
    if turns != f"{start}{_USER}{answer}{_ASSISTANT}{answer_end}{user}{_AGAIN}{answer}":
        return None
    return None if any("{{" in piece or '"""' in piece for piece in pieces if piece) else pieces


def _render(tokenizer: Any, *turns: tuple[str, str]) -> str:
    """A conversation by the chat template; empty if there is no template, or it does not take this conversation."""
    if not tokenizer.chat_template:
        return ""
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise errors of several classes, e.g. for a role that they do not know
        return ""
    ids = tokenizer("a")["input_ids"]
    adds_bos = tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text  # the runtime adds it too


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
