"""The toy text encoder: each word of a caption becomes one row of a fixed table, and the rest of the rows are zero, as in the real models.

Knows nothing of the captions' grammar; any sentence of known words is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.identity import digest

FILE_NAME = "text_encoder.safetensors"
TEXT_DIM = 32
TEXT_LEN = 8


class ToyTextEncoder:
    """A text encoder that looks words up in `table` [len(vocabulary), text_dim] fp32.

    Attributes:
        vocabulary: the known words, in the order of the table's rows.
        text_len: rows of every embedding, padding included.
        text_dim: width of a row.
    """

    def __init__(self, vocabulary: Sequence[str], table: Tensor, *, text_len: int = TEXT_LEN) -> None:
        if table.dim() != 2 or table.shape[0] != len(vocabulary):
            raise ValueError(f"a vocabulary of {len(vocabulary)} words needs a table of as many rows, not {tuple(table.shape)}")
        self.vocabulary = tuple(vocabulary)
        self.table = table.float()
        self.text_len = text_len
        self.text_dim = table.shape[1]
        self._row = {word: row for row, word in enumerate(self.vocabulary)}

    @classmethod
    def for_captions(cls, captions: Sequence[str], *, text_dim: int = TEXT_DIM, text_len: int = TEXT_LEN, seed: int = 0) -> ToyTextEncoder:
        """Return a new encoder for every word of `captions`: orthogonal rows with a mean square of 1."""
        vocabulary = sorted({word for caption in captions for word in caption.split()})
        if len(vocabulary) > text_dim:
            raise ValueError(f"{len(vocabulary)} words do not fit into {text_dim} orthogonal rows")
        square = torch.randn(text_dim, text_dim, generator=torch.Generator().manual_seed(seed))
        orthogonal = torch.linalg.qr(square).Q[: len(vocabulary)] * text_dim**0.5
        return cls(vocabulary, orthogonal.half().float(), text_len=text_len)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts: [B, text_len, text_dim] fp32; rows beyond a prompt's words are exactly 0.

        Raises:
            UserError: a word that is not in the vocabulary, or more words than rows.
        """
        embeddings = torch.zeros(len(prompts), self.text_len, self.text_dim)
        for prompt, rows in zip(prompts, embeddings, strict=True):
            words = prompt.split()
            unknown = [word for word in words if word not in self._row]
            if unknown:
                known = ", ".join(self.vocabulary)
                raise UserError(f"the toy text encoder does not know the word {unknown[0]!r} in {prompt!r}; use only: {known}")
            if len(words) > self.text_len:
                raise UserError(f"the prompt {prompt!r} has {len(words)} words; the toy text encoder takes at most {self.text_len}")
            rows[: len(words)] = self.table[[self._row[word] for word in words]]
        return embeddings

    @property
    def fingerprint(self) -> str:
        """Digest of the vocabulary, the table and the number of rows."""
        about = json.dumps([self.vocabulary, self.text_len, list(self.table.shape)])
        return digest(about.encode() + self.table.contiguous().numpy().tobytes())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the table (fp16) and the vocabulary to one safetensors file in `directory`."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"vocabulary": json.dumps(self.vocabulary), "text_len": str(self.text_len)}
        atomic_write(path, save({"table": self.table.half().contiguous()}, metadata))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ToyTextEncoder:
        """Read what `save_pretrained` wrote. Raises UserError if the file is missing or is something else."""
        path = Path(directory) / FILE_NAME
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                return cls(json.loads(metadata["vocabulary"]), file.get_tensor("table"), text_len=int(metadata["text_len"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"cannot read a toy text encoder from {path}: {error}; expected what ToyTextEncoder.save_pretrained writes"
            ) from error
