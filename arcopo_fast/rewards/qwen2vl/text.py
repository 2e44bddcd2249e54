"""The text that a Qwen2-VL judge reads: the instruction of its authors, the prompt in it, as tokens.

An instruction belongs to its authors and is nowhere in this package: it is taken from a file of theirs.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from arcopo_fast.errors import UserError
from arcopo_fast.storage import hub

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What base models' chat template makes of one turn by the user, a video or an image first (Qwen2-VL, chat_template.json).
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{}<|vision_end|>"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"


class Conversation:
    """The words that a judge is told about a video or an image, as tokens.

    Args:
        tokenizer: as from `load_tokenizer`.
        template: the instruction, with {text_prompt} where the prompt goes and the tokens where scores are read.
        vision: the token that stands for the vision tower's features, <|video_pad|> or <|image_pad|>.
        tokens: where scores are read, in this order.

    Raises:
        UserError: the template lacks one of them.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, vision: str, tokens: Sequence[str]) -> None:
        if missing := [part for part in ("{text_prompt}", *tokens) if part not in template]:
            raise UserError(f"the judge's instruction has no {' and no '.join(missing)}; get its file again")
        self.tokenizer = tokenizer
        self.template = template
        self.vision = vision
        self.pad, *self.tokens = (_id(tokenizer, token) for token in (vision, *tokens))

    def encode(self, prompt: str, features: int) -> tuple[list[int], list[int]]:
        """The tokens of a conversation about something of `features` features, and the places where scores are read.

        Raises:
            UserError: the prompt itself contains one of the tokens that mean something here.
        """
        text = _BEFORE.format(self.vision) + self.template.format(text_prompt=prompt) + _AFTER
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if any(ids.count(token) != 1 for token in (self.pad, *self.tokens)):
            raise UserError(f"the prompt {prompt[:60]!r} contains a token that the judge reserves for itself; rephrase it")
        at = ids.index(self.pad)
        ids[at : at + 1] = [self.pad] * features
        return ids, [ids.index(token) for token in self.tokens]


def load_tokenizer(base: Path, tokens: Sequence[str]) -> Tokenizer:
    """The base model's tokenizer, with a judge's own tokens behind the others."""
    from tokenizers import Tokenizer

    file = base / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"{file} is damaged or not a tokenizer ({error}); get it again") from error
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(f"the base model's tokenizer.json has no {token}; expected that of a Qwen2-VL")
    return found


def read_instruction(directory: Path, source: str, constants: Sequence[str]) -> str:
    """The text that a judge's authors wrote, joined from constants of one of their Python files, which is parsed and never run.

    Args:
        directory: of the weights; the file may lie beside them.
        source: of the file, github://owner/name/path.
        constants: names of texts at its top level.

    Raises:
        UserError: there is no such file or constant.
    """
    beside = directory / PurePosixPath(source).name
    file = beside if beside.is_file() else hub.find(source)
    try:
        statements = ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError, OSError) as error:
        raise UserError(f"{file} is not a Python file ({error}); get it again") from error
    texts = {
        target.id: statement.value.value
        for statement in statements
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    if missing := [constant for constant in constants if constant not in texts]:
        raise UserError(f"{file} has no text {' and no '.join(missing)}, only {', '.join(texts) or 'none at all'}; get it again")
    return "".join(texts[constant] for constant in constants)
