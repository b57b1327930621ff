"""``certify smooth``: randomised smoothing, a probabilistic certificate of the smoothed classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DataOptions, NetworkOptions, OutputOptions

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.smoothing import SmoothedAccuracy


def smooth(
    networks: NetworkOptions,
    data: DataOptions,
    output: OutputOptions,
    radius: Annotated[str, typer.Option(metavar="R,...", help="l2 radii, exact: 0.25 or 36/255.")] = "0.25,0.5",
    sigma: Annotated[float, typer.Option(metavar="S", help="Standard deviation of the noise.")] = 0.25,
    count: Annotated[int, typer.Option(metavar="N", help="Noisy copies of every image.")] = 10_000,
    alpha: Annotated[float, typer.Option(metavar="P", help="How likely a certificate may be wrong.")] = 0.001,
) -> None:
    """Randomised smoothing: probably robust, in l2.

    Certifies the SMOOTHED classifier, the likeliest class under Gaussian noise, with probability 1 - alpha per image:
    no proof, and not about the network itself. Train with --method noise.
    """
    from rich.markup import escape

    from analysis.protocol import Protocol
    from analysis.smoothing import smoothed_accuracy
    from certify.smoothing import Smoothing
    from cli import output as out
    from cli.parsing import radii
    from cli.subjects import inputs, samples, subjects

    console = out.console(output.json)
    asked, protocol = subjects(networks), Protocol(radii=radii(radius), p=2.0, methods=(), seed=data.seed)
    smoothing = Smoothing(sigma=sigma, alpha=alpha, count=count)
    given = samples(data, asked)
    console.print(f"{given.text}\n", soft_wrap=True)
    found = {}
    for network in asked:
        x = inputs(network, given)
        with out.progress(network.name, len(x)) as tick:
            found[network.name] = smoothed_accuracy(
                network.model, x, given.y, smoothing, protocol, index=given.index, tick=tick
            )
        console.print(f"[bold]{escape(network.name)}[/]: {network.network}; normalisation: {network.normalisation}")
        console.print(table_of(found[network.name]))
    console.print(
        f"PROBABLE, not proved: each certificate is wrong with probability {alpha:g} at most, and speaks of the "
        "smoothed classifier.",
        soft_wrap=True,
    )
    options = out.arguments(networks, data, radius=radius, sigma=sigma, count=count, alpha=alpha)
    out.publish(output.json, "smooth", options, {"samples": given.text, "networks": found})


def table_of(found: SmoothedAccuracy) -> Table:
    """Return a row per radius."""
    from cli import theme

    title = f"Smoothed classifier, sigma {found.sigma:g}, {found.count:,} copies: accuracy in percent (95 % interval)"
    made = theme.table(title, "l2 radius", "right", "abstains", "probably certified")
    for radius, rate in zip(found.radii, found.certified, strict=True):
        made.add_row(theme.radius(radius), theme.rate(found.clean), theme.rate(found.abstained), theme.rate(rate))
    return made
