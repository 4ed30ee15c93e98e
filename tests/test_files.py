"""Files appear whole, with normal permissions, or not at all; a failure leaves nothing behind."""

import os

import numpy as np
import pytest

from cli import UserError
from files import atomic, claim, reading, save_tensors, writable, write_json


def test_files_are_as_open_as_this_machine_has_them(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": np.ones(3)}, {})
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    for name in ("a.safetensors", "a.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


def test_a_claim_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no model"), claim(tmp_path / "new" / "deep"):
        raise UserError("there is no model")
    assert not list(tmp_path.iterdir())
    with claim(tmp_path / "new"):
        write_json(tmp_path / "new" / "a.json", {})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_folder_has_one_writer(tmp_path):
    (tmp_path / ".part-1-a.json").touch()
    with claim(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with pytest.raises(UserError, match="another process writes"), claim(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    with claim(tmp_path):
        pass


def test_a_file_that_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_asking_whether_a_folder_can_be_written_leaves_no_trace(tmp_path):
    writable(tmp_path / "new" / "deep")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        writable(tmp_path / "file" / "deep")


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("x"), SyntaxError("png"), OSError()])
def test_whatever_goes_wrong_while_reading_is_one_line(error):
    told = pytest.raises(UserError, match="cannot read a.json.*; mend it")
    with told, reading("a.json", "mend it"):
        raise error
