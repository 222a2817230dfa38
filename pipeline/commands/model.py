"""Commands for a trained model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands.options import JsonOption, SiteOption, StorageOption, site_of


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
    from pipeline.commands.route import route as route_images

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
    from pipeline.commands.export import export as export_run

    export_run(site_of(site, storage).storage, run, out, layout)
    typer.echo(f"exported to {out}")


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or Hub id, routed or not.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="Weights and computation.")
    ] = "float32",
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0, max=1, help="In place of the model's own."),
    ] = None,
    max_body_mb: Annotated[int, typer.Option("--max-body-mb", min=1, help="Bytes of a request.")] = 32,
    max_megapixels: Annotated[int, typer.Option("--max-megapixels", min=1, help="Of one picture.")] = 50,
    max_request_megapixels: Annotated[
        int, typer.Option("--max-request-megapixels", min=1, help="Of all pictures of one request together.")
    ] = 200,
    max_pictures: Annotated[int, typer.Option("--max-pictures", min=0, help="Of one request.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of one answer.")] = 1024,
    max_total_tokens: Annotated[
        int, typer.Option("--max-total-tokens", min=0, help="Prompt and answer; 0 is the model's own limit.")
    ] = 0,
    max_requests: Annotated[
        int, typer.Option("--max-requests", min=1, help="In the server at once; one is answered at a time.")
    ] = 32,
) -> None:
    """Answer chat requests of OpenAI's form about pictures until stopped."""
    from pipeline.serving.requests import Limits
    from pipeline.serving.server import Place
    from pipeline.serving.server import serve as serve_model

    limits = Limits(
        body_bytes=max_body_mb * 2**20,
        picture_pixels=max_megapixels * 10**6,
        request_pixels=max_request_megapixels * 10**6,
        pictures=max_pictures,
        new_tokens=max_new_tokens,
        total_tokens=max_total_tokens,
        waiting=max_requests,
    )
    serve_model(model, Place(host, port, device, dtype), limits, threshold)
