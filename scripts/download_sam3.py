"""Download SAM3's weights into sam3_checkpoints/, resumably, and verify them.

    python scripts/download_sam3.py --dry-run      # access, size, free space
    python scripts/download_sam3.py

The repository is gated: accept its conditions at https://huggingface.co/facebook/sam3, then run `hf auth login` or pass
--token. An interrupted download goes on when the command is run again. Exit code 1 unless every file is there, whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sam3.engine.cli import make_parser, run_main
from sam3.engine.hub import SAM3_FILES, SAM3_FOLDER, SAM3_REPO, SAM3_TENSORS, check_checkpoint, download_sam3


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    paths = download_sam3(
        arguments.output,
        repo=arguments.repo,
        revision=arguments.revision,
        token=arguments.token,
        force=arguments.force,
        dry_run=arguments.dry_run,
    )
    if arguments.dry_run:
        print("dry run: access is granted, nothing was fetched")
        return 0
    check_checkpoint(paths[0])
    print(f"{paths[0]} is whole and holds the {SAM3_TENSORS} tensors of SAM3")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=SAM3_FOLDER, help=f"folder for {' and '.join(SAM3_FILES)}")
    parser.add_argument("--repo", default=SAM3_REPO, help="hub repository, for a mirror of the same files")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the repository")
    parser.add_argument("--token", help="hub token (default: HF_TOKEN, or the login of `hf auth login`)")
    parser.add_argument("--force", action="store_true", help="replace files of the same name that differ")
    parser.add_argument("--dry-run", action="store_true", help="check access and free space, fetch nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
