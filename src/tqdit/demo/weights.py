"""The demo models' weights, of the distribution `tqdit-demo` (folder `demo-weights`), each known by its SHA-256."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tqdit.errors import CheckpointError, MissingLibraryError
from tqdit.files import sha256

TEXT = "text"  # the pipeline of the text demo: what a user writes, and its folder

# As `scripts/train_demo.py package` and `scripts/train_text_demo.py package` say them.
DIGESTS = {
    "model.safetensors": "9db237a5476412b5386557b9bca9a0fd5b46a61ffa79ce9bf26270e048a5399a",
    "judge.safetensors": "9f5ed1b5550e7d1c35ee1337a9c51cabde1d106cfe269a823895acb55a955f19",
    "text/judge.safetensors": "e02a1f64b3534a989e834b4670bc1e814098e50d4f13ee9439a30d0a04df3145",
    "text/model.json": "7de79b19abce944850b2f915d74199cf644529bce2ec21f7c1c89024cea3f2e7",
    "text/model_index.json": "bbeb5b77cc1150ea9031bf86baf0a1bce8213d862b73a24af1113cb074ea2310",
    "text/scheduler/scheduler_config.json": "e70f26bafa70892cccf999835680254ad93d3d6f5ac2867449907ecda4902251",
    "text/text_encoder/config.json": "2f87034cb049aac86e951be3878d6f9756497c78a266706a93e1e65db8073a07",
    "text/text_encoder/model.safetensors": "05e4618af2e3bb09018073de99ed732193505f5e99fe3f117a311e9096edf398",
    "text/tokenizer/tokenizer.json": "76c9912abdb71f18e7bbad69417bb2d7c14e587260d55b5f9458a2a819024f6d",
    "text/tokenizer/tokenizer_config.json": "e740cefeb50240e7df11c7ed4121f277ab369414b96b3204ca15c113cddad78d",
    "text/training.json": "231b00f75163aebbfb602b6dc422af45819eb919dd29aa5fd7a9bc821fe8dd2f",
    "text/transformer/config.json": "eacd32740dc5c80c844acaf20e9d2244c2ba7eda6a509f556d55dafea2974ae1",
    "text/transformer/diffusion_pytorch_model.safetensors": "6362e043526f52ce21ad40030cd71b9004e8e2b4c4b72573afc92361206f4e8d",
    "text/vae/config.json": "88fdf88da95149627ceeb0c604b32098be603d479bcead4024eb849eaa6b1593",
    "text/vae/diffusion_pytorch_model.safetensors": "8eb33dbadf03f787943036eff9586556b63e330d18231e88e3436183fb2f285d",
}


def shipped_pipeline() -> Path:
    """The directory of the text demo's pipeline, whole and unaltered."""
    files = {name: shipped(name) for name in DIGESTS if name.startswith(f"{TEXT}/")}
    return files[f"{TEXT}/model_index.json"].parent


def shipped(name: str) -> Path:
    """The file of that name, whole and unaltered. Raises MissingLibraryError if `tqdit-demo` is not installed."""
    try:
        path = Path(str(resources.files("tqdit_demo"))) / name
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            "the demo model's weights are in tqdit-demo, which is not installed. Run: pip install ./demo-weights (in a "
            "clone of tqdit, or the path of a wheel of tqdit-demo)"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; it comes with tqdit-demo. Install tqdit-demo again.")
    if sha256(path) != DIGESTS[name]:
        raise CheckpointError(f"{path}: its SHA-256 is not that of this tqdit's demo model. Install tqdit-demo again.")
    return path
