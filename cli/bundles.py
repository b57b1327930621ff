"""What stands around a command: options as nouns, and the check of the house."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

from cli.complaints import INTERRUPTED


def bundled(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with each parameter that is a dataclass replaced by that class's fields, as options.

    Fields carry their option as ``Annotated[kind, typer.Option(...)]`` and their default, as parameters do.
    """
    hints = get_type_hints(command, include_extras=True)
    given = inspect.signature(command).parameters
    bundles = {name: hints[name] for name in given if dataclasses.is_dataclass(hints[name])}
    options: list[inspect.Parameter] = []
    for name, parameter in given.items():
        if name in bundles:
            options += _options(bundles[name])
        else:
            options.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        whole = {
            name: bundle(**{field.name: values.pop(field.name) for field in dataclasses.fields(bundle)})
            for name, bundle in bundles.items()
        }
        command(**whole, **values)

    flat.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    flat.__annotations__ = {option.name: option.annotation for option in options}
    return flat


def at_home(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` behind a check that our packages are not hidden by a user's folders of the same names."""

    @functools.wraps(command)
    def checked(**values: Any) -> None:
        from certify.errors import require_siblings

        require_siblings("models", "analysis", "cli")
        try:
            command(**values)
        except KeyboardInterrupt:  # typer would end without a word
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return checked


def _options(bundle: type) -> list[inspect.Parameter]:
    hints = get_type_hints(bundle, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(bundle)
    ]
