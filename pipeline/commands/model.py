"""Commands that use a trained model."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands.options import JsonOption, RunArgument, SiteOption, StorageOption, site_of
from pipeline.terminal.output import terminal
from vico.errors import UserError

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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model with a router.")],
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
    from vico.checkpoints.hub import model_folder

    route_images(model_folder(model), images, out, threshold, as_json, Placement(device, dtype))


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
    rule: Annotated[
        Literal["absolute", "published", "full"] | None,
        typer.Option(
            "--rule", help="Routing of requests that name no rule; default: absolute if there is a router."
        ),
    ] = None,
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
            help="Largest number of requests in the server, waiting or answered.",
        ),
    ] = 64,
    max_requests_per_client: Annotated[
        int,
        typer.Option(
            "--max-requests-per-client",
            min=0,
            help="Largest number of requests of one client (key and address); 0: 3/4 of --max-requests.",
        ),
    ] = 0,
    max_held_mb: Annotated[
        int,
        typer.Option("--max-held-mb", min=1, help="Largest size of all requests in the server, in MiB."),
    ] = 256,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Largest number of answers computed at once.")
    ] = 16,
    cache_tokens: Annotated[
        int,
        typer.Option(
            "--cache-tokens",
            min=0,
            help="Tokens of all answers computed at once, with their prompts; 0: 32768, or "
            "--max-total-tokens if that is more.",
        ),
    ] = 0,
    picture_cache_mb: Annotated[
        int,
        typer.Option("--picture-cache-mb", min=0, help="Encoded pictures kept for later requests, in MiB."),
    ] = 256,
    header_timeout: Annotated[
        float,
        typer.Option("--header-timeout", min=0.1, help="Time for the head of a request, in seconds."),
    ] = 10,
    body_timeout: Annotated[
        float, typer.Option("--body-timeout", min=0.1, help="Time for the body of a request, in seconds.")
    ] = 60,
    idle_timeout: Annotated[
        float,
        typer.Option(
            "--idle-timeout",
            min=0.1,
            help="Time in which a client must send some of its request or take some of its answer, "
            "in seconds.",
        ),
    ] = 10,
    drain: Annotated[
        float,
        typer.Option(
            "--drain", min=0, help="Time for running answers to end after SIGINT or SIGTERM, in seconds."
        ),
    ] = 10,
    engine: Annotated[
        Literal["builtin", "vllm"],
        typer.Option("--engine", help="What runs the language model; vllm needs an environment with vLLM."),
    ] = "builtin",
    engine_python: Annotated[
        str,
        typer.Option(
            "--engine-python",
            help="Python of the environment with vLLM; default: this one.",
            show_default=False,
        ),
    ] = sys.executable,
    engine_folder: Annotated[
        Path | None,
        typer.Option("--engine-folder", help="Folder for the language model alone; default: MODEL.language."),
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option("--engine-arg", help="Argument of `vllm serve`, as --name=value; repeatable."),
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(
            "--replicas",
            min=0,
            help="Copies of the model in processes of Ray Serve, on the Ray of --site; 0: one, in this "
            "process.",
        ),
    ] = 0,
    site: SiteOption = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="VICO_API_KEY",
            help="Key that clients must give. Other users of this machine see it; better use the variable "
            "or --api-key-file.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File of keys, one per line; each is accepted.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Name by which clients may call the server, beside localhost and IP addresses; repeatable.",
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-proxy",
            help="Address of a proxy whose X-Forwarded-For names the client; repeatable.",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP.

    The server answers OpenAI-style chat requests about pictures until it is stopped.
    """
    from pipeline.serving.http.access import Access, api_keys, host_name
    from pipeline.serving.limits import Limits
    from pipeline.serving.server import serve as serve_model
    from pipeline.serving.start.settings import ReplicaOptions, ServerSettings, VllmOptions
    from pipeline.serving.vllm.process import engine_arguments

    limits = Limits(
        body_bytes=max_body_mb * 2**20,
        picture_pixels=max_megapixels * 10**6,
        request_pixels=max_request_megapixels * 10**6,
        pictures=max_pictures,
        new_tokens=max_new_tokens,
        total_tokens=max_total_tokens,
        waiting=max_requests,
        per_client=max_requests_per_client,
        held_bytes=max_held_mb * 2**20,
        header_timeout_s=header_timeout,
        body_timeout_s=body_timeout,
        idle_timeout_s=idle_timeout,
        batch=max_batch,
        cache_tokens=cache_tokens,
        picture_cache_bytes=picture_cache_mb * 2**20,
        drain_s=drain,
    )
    access = Access(api_keys(api_key, api_key_file), tuple(map(host_name, allowed_host or ())))
    vllm = None
    if engine == "vllm":
        vllm = VllmOptions(engine_python, engine_arguments(engine_arg or ()), engine_folder)
    replicated = None
    if replicas:
        replicated = ReplicaOptions(replicas, site_of(site, None))
    elif site is not None:
        raise UserError(f"--site={site} has no effect without --replicas; give both or none")
    proxies = tuple(trusted_proxy or ())
    settings = ServerSettings(host, port, device, dtype, access, proxies, vllm, replicated)
    serve_model(model, settings, limits, threshold, rule)
