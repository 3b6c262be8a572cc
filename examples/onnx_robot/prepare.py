"""Everything that robot.py needs of a checkpoint, in one directory. Runs where PyTorch and Turbo-Pi are installed.

    python examples/onnx_robot/prepare.py checkpoints/pi05-libero-small /tmp/robot

For π0.5 checkpoints with the state in the prompt, quantile statistics and a sentencepiece tokenizer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from turbopi import load_policy
from turbopi.checkpoint import open_checkpoint
from turbopi.export import ExportSpec, export, weights_of_checkpoint
from turbopi.transforms import PolicyTransforms, find_tokenizer

TOKEN_STEP = 16


def prepare(checkpoint: Path, out: Path, steps: int = 10) -> None:
    """Write graphs, weights, manifest and robot.json. Raises ValueError for a policy that robot.py does not speak."""
    opened = open_checkpoint(checkpoint)
    transforms = load_policy(checkpoint, device="cpu").transforms
    facts = robot_facts(transforms, find_tokenizer(None, checkpoint))
    most = opened.config.max_tokens
    buckets = (*range(3 * TOKEN_STEP, most, TOKEN_STEP), most)
    spec = ExportSpec(steps=steps, views=len(facts["cameras"]), prompt_buckets=buckets)
    export(weights_of_checkpoint(opened), spec, out)
    (out / "robot.json").write_text(json.dumps(facts, indent=1) + "\n")


def robot_facts(transforms: PolicyTransforms, tokenizer: Path) -> dict[str, Any]:
    """What robot.json holds."""
    told = transforms.describe()
    spoken = {
        "model_kind": "pi05",
        "convention": "openpi",
        "prompt_convention": "openpi",
        "state_in_prompt": True,
        "state_normalization": "quantile",
        "action_normalization": "quantile",
        "resize": "PIL bilinear, antialiased",
        "absolute_mask": None,
    }
    other = {name: told[name] for name, value in spoken.items() if told[name] != value}
    if other or tokenizer.suffix != ".model":
        raise ValueError(
            f"robot.py does not speak {other or tokenizer.name}; it speaks {spoken}, with a .model tokenizer"
        )
    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    ids = range(pieces.get_piece_size())
    # Controls and bytes are never found in text; the rest has the score by which neighbours are joined.
    found = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in ids]
    stats = {"state": transforms.state.stats, "actions": transforms.actions.stats}
    return {
        "robot": told["robot"],
        "cameras": [camera["key"] for camera in told["camera_slots"] if camera["key"]],
        "image_size": told["image_size"],
        "max_tokens": told["max_tokens"],
        "action_dim": told["action_dim"],
        **{
            name: {key: value for key, value in s.to_dict().items() if key in ("q01", "q99")}
            for name, s in stats.items()
        },
        "pieces": found,
        "whole": [piece for i, (piece, _) in zip(ids, found, strict=True) if piece == "\n"],
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} CHECKPOINT OUT")
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"wrote {sys.argv[2]}; run it with: python examples/onnx_robot/play.py {sys.argv[2]}")
