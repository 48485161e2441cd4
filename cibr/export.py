"""A run's model as a `local-dir` of open_clip's, which its users and clip_benchmark load by name."""

from __future__ import annotations

import json
from pathlib import Path

from cibr.errors import UsageError
from cibr.models.open_clip import OpenClip, tokenizer_of
from cibr.run import checkpoint
from cibr.run.atomic import atomic_directory


def export(run: Path, out: Path) -> None:
    """Writes open_clip_config.json and open_clip_model.safetensors to `out`.

    Raises UsageError for a run whose model is none of open_clip's and for an `out` in use.
    """
    from open_clip import get_model_preprocess_cfg
    from safetensors.torch import save_file

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already; choose another folder")
    model = checkpoint.load_run(run).model
    if not isinstance(model, OpenClip):
        raise UsageError(f"{run} has a model {model.options.model}, and only open_clip's can be exported")
    config = {"model_cfg": model.recipe["model_cfg"], "preprocess_cfg": get_model_preprocess_cfg(model.clip)}
    with atomic_directory(out) as work:
        (work / "open_clip_config.json").write_text(json.dumps(config, indent=1))
        if model.recipe["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
            tokenizer_of(model.recipe).tokenizer.save_pretrained(work)  # type: ignore[attr-defined]
        save_file(
            {name: t.contiguous() for name, t in model.clip.state_dict().items()}, work / "open_clip_model.safetensors"
        )
