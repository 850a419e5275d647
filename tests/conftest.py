"""What the tests of several stages begin with, made once: a tiny teacher, a small data set, a finished export of its
embeddings, and a finished Stage-1 training."""

from __future__ import annotations

from pathlib import Path

import pytest

FULL_SIZE = ("full_size", "parity")  # in the names of tests that take several GiB


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no process of several is left alone with one in the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """One process of several runs all that takes much memory, one test after the other, and makes its fixtures once."""
    from xdist.scheduler import LoadScopeScheduling

    class FullSizeTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "full size" if any(word in nodeid for word in FULL_SIZE) else nodeid

    return FullSizeTogether(config, log)


# The stages are imported inside the fixtures: other tests do not wait for them.


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAM3 of the tiny preset."""
    from scripts import make_tiny_sam3

    path = tmp_path_factory.mktemp("teacher") / "sam3_tiny.pt"
    assert make_tiny_sam3.main(["--output", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def sa1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 train and 3 val pictures in the SA-1B layout; to be left as it is."""
    from tests.samples import write_sa1b

    root = tmp_path_factory.mktemp("sa1b")
    write_sa1b(root, num_train=8, num_val=3)
    return root


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, sa1b: Path) -> Path:
    """Output folder of an export of `sa1b`; to be left as it is."""
    from stage1 import save_embedding_stage1
    from tests.stage1.runs import teacher_arguments

    output = tmp_path_factory.mktemp("export")
    assert save_embedding_stage1.main(teacher_arguments(teacher_file, sa1b, output)) == 0
    return output


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, exported: Path, sa1b: Path) -> Path:
    """Output folder of two epochs of training on `exported`; to be left as it is."""
    from stage1 import train_stage1
    from tests.stage1.runs import student_arguments

    output = tmp_path_factory.mktemp("train")
    assert train_stage1.main(student_arguments(exported, sa1b, output)) == 0
    return output
