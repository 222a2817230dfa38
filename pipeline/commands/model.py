"""Commands that use a trained model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands.options import JsonOption, RunArgument, SiteOption, StorageOption, site_of
from pipeline.terminal.output import terminal

ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        min=0,
        max=1,
        help="Compress tiles from this probability on; default: the model's threshold.",
    ),
]

DeviceOption = Annotated[str, typer.Option("--device", help="Device of the model: cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16"], typer.Option("--dtype", help="Type of weights and computation.")
]


# Long because every option is declared here; the body only passes them on.
def route(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model with a router.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Picture files, or folders of them.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Draw the tiles and their tokens into this file (PNG, JPEG or WebP; several pictures in a "
            "grid), or into one file per picture in this folder.",
        ),
    ] = None,
    threshold: ThresholdOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Show how many tokens each tile of a picture gets."""
    from pipeline.commands.route import Placement
    from pipeline.commands.route import route as route_images

    route_images(model, images, out, threshold, as_json, Placement(device, dtype))


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist yet.")],
    layout: Annotated[
        Literal["flash", "hf"],
        typer.Option(
            "--layout", help="flash: the published InternVL Flash layout, for servers; hf: Hugging Face."
        ),
    ],
    site: SiteOption = None,
    storage: StorageOption = None,
) -> None:
    """Write a finished run's model for servers or transformers."""
    from pipeline.commands.export import export as export_run

    export_run(site_of(site, storage).storage, run, out, layout)
    terminal().line(f"exported to {out}")


# Long because every option is declared here; the body only passes them on.
def serve(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model folder or Hub id; the model needs no router."),
    ],
    host: Annotated[str, typer.Option("--host", help="Address that the server listens on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port that the server listens on; 0: any free port."),
    ] = 8000,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    threshold: ThresholdOption = None,
    max_body_mb: Annotated[
        int, typer.Option("--max-body-mb", min=1, help="Largest size of a request, in MiB.")
    ] = 32,
    max_megapixels: Annotated[
        int, typer.Option("--max-megapixels", min=1, help="Largest size of a picture, in megapixels.")
    ] = 50,
    max_request_megapixels: Annotated[
        int,
        typer.Option(
            "--max-request-megapixels",
            min=1,
            help="Largest size of all pictures of a request together, in megapixels.",
        ),
    ] = 200,
    max_pictures: Annotated[
        int, typer.Option("--max-pictures", min=0, help="Largest number of pictures in a request.")
    ] = 16,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Largest number of tokens in an answer.")
    ] = 1024,
    max_total_tokens: Annotated[
        int,
        typer.Option(
            "--max-total-tokens",
            min=0,
            help="Largest number of tokens in prompt and answer together; 0: the model's limit.",
        ),
    ] = 0,
    max_requests: Annotated[
        int,
        typer.Option(
            "--max-requests",
            min=1,
            help="Largest number of requests in the server, which answers one at a time.",
        ),
    ] = 32,
) -> None:
    """Serve a model over HTTP.

    The server answers OpenAI-style chat requests about pictures until it is stopped.
    """
    from pipeline.serving.limits import Limits
    from pipeline.serving.server import ServerSettings
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
    serve_model(model, ServerSettings(host, port, device, dtype), limits, threshold)
