"""The theatre: a local page on which a prediction is taken apart by hand."""

import sys
from typing import Annotated

import typer

from resid_surgery.cli.common import Device, Dtype, Model, app, load


@app.command()
def serve(
    model: Model = "smollm2-135m",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 for any free one.")] = 8420,
    host: Annotated[
        str, typer.Option("--host", help="127.0.0.1, localhost or ::1; no other is accepted.")
    ] = "127.0.0.1",
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The theatre: type a prompt, turn subvalues up and down, cut edges, watch the prediction; export a recipe."""
    import webbrowser

    from resid_surgery.views.theatre_guard import loopback
    from resid_surgery.views.theatre_server import prepare, theatre

    loopback(host)
    prepare()  # before what imports nnsight

    from resid_surgery.views.theatre_recipe import load_text

    opened = load(model, dtype, device)

    def ready(url: str) -> None:
        sys.stderr.write(f"The theatre of {opened.name} is at {url} (Ctrl-C closes it)\n")
        sys.stderr.flush()
        if not no_open:
            webbrowser.open(url)

    theatre(opened, load_text(model, dtype, device), host=host, port=port, opened=ready).run()
