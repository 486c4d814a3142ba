"""What a user states about a network on the command line: mean, std, names, output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.engines.named_files import utf8_text
from runtime.errors import InputError
from runtime.prior.names import names_in_option
from runtime.prior.preprocess import Preprocess, numbers_in
from runtime.prior.reading import KINDS


@dataclass(frozen=True, kw_only=True)
class Stated:
    """Facts about a network that its file does not contain, or that replace those in the file.

    Parameters
    ----------
    mean, std : three numbers each, of the colours with which the network was trained, for values in
        [0, 1]; None: the file contains them.
    names : the names of the classes in the order of their numbers, or None.
    output : "logits", "probabilities" or "labels"; None: metadata or the values decide.
    output_name : the name of the output to take, of several; None: metadata or the shapes decide.

    Raises
    ------
    InputError : a value of another kind or out of range.

    Example
    -------
    >>> Stated.from_words(mean=["0.5,0.5,0.5"], std=["1", "1", "1"], names="road,sky")
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    names: Sequence[str] | None = None
    output: str | None = None
    output_name: str | None = None

    def __post_init__(self) -> None:
        ones = (1.0, 1.0, 1.0)  # Preprocess checks the numbers
        Preprocess(mean=self.mean or ones, std=self.std or ones, height=1, width=1)  # type: ignore[arg-type]
        output_name = utf8_text(self.output_name or "")
        if output_name != (self.output_name or ""):
            raise InputError(
                f"output-name is '{output_name}', which is not UTF-8",
                fix="write it in UTF-8: the terminal uses another encoding",
            )
        if self.output not in (None, *KINDS):
            raise InputError(
                f"output is {self.output!r}; wanted {', '.join(KINDS)}",
                fix=f"--output {KINDS[0]}, or leave it out",
            )

    @classmethod
    def from_words(
        cls,
        *,
        mean: Sequence[str] | None = None,
        std: Sequence[str] | None = None,
        names: str | None = None,
        output: str | None = None,
        output_name: str | None = None,
    ) -> Stated:
        """The facts from words of a command line.

        Parameters
        ----------
        mean, std : three numbers, in one word with commas or in three words.
        names : a file with a name in each line, with commas between them or with JSON; or the names
            with commas between them; or a JSON list or object. One word that has no suffix and no
            slash is the name of the foreground.
        output, output_name : as for the class.

        Raises
        ------
        InputError : words that are no numbers, or a file that cannot be read; also that of the
            class.
        """
        return cls(
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            names=None if names is None else names_in_option(names),
            output=output,
            output_name=output_name,
        )

    @property
    def options(self) -> list[str]:
        """The options whose values are stated: "--mean" and so on."""
        return [
            f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None
        ]

    def metadata(self) -> dict[str, str]:
        """The facts as metadata_props of an ONNX file."""
        values = {"mean": self.mean, "std": self.std, "classes": self.names}
        texts = {key: json.dumps(value) for key, value in values.items() if value is not None}
        plain = {"output": self.output, "output_name": self.output_name}
        return texts | {key: text for key, text in plain.items() if text is not None}


def _numbers(name: str, words: Sequence[str] | None) -> tuple[float, ...] | None:
    """The numbers in the words of an option; None if ``words`` is None."""
    if words is None:
        return None
    numbers = numbers_in(" ".join(words))
    if numbers is None:
        raise InputError(
            f"{name} is {' '.join(words)!r}; wanted three numbers",
            fix=f"--{name} 0.485,0.456,0.406",
        )
    return numbers
