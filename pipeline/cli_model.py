"""Commands for a trained model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli_options import JsonOption, SiteOption, StorageOption, site_of


def route(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A routed model folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw the tiles with their tokens to this PNG.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0, max=1, help="Compress a tile from this probability on."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which tiles of pictures get how many tokens."""
    from pipeline.route import route as route_images

    route_images(model, images, out, threshold, as_json)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id, beginning of an id, or `latest`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    layout: Annotated[
        Literal["flash", "hf"],
        typer.Option("--layout", help="flash: published InternVL Flash, for servers; hf: Hugging Face."),
    ],
    site: SiteOption = None,
    storage: StorageOption = None,
) -> None:
    """Write the model of a finished run as a folder that servers or transformers open."""
    from pipeline.export_command import export as export_run

    export_run(site_of(site, storage).storage, run, out, layout)
    typer.echo(f"exported to {out}")
