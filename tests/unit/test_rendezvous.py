"""The directory with the key of a connection: who can read it, what is refused, and that it does not stay."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpu_launcher.nodes.authentication import new_key
from gpu_launcher.nodes.rendezvous import Contact, RendezvousDirectory, read_contact

CONTACT = Contact(("login1", "10.0.0.1"), 40123, new_key())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_this_user_can_read_the_key_with_any_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        directory = RendezvousDirectory.create(tmp_path, CONTACT)
    finally:
        os.umask(before)
    assert (mode(directory.path), mode(directory.key_file), mode(directory.script)) == (0o700, 0o600, 0o700)
    assert directory.path.parent == tmp_path
    assert read_contact(directory.key_file) == CONTACT


def test_directory_is_removed_with_all_files(tmp_path):
    directory = RendezvousDirectory.create(tmp_path, CONTACT)
    directory.output.write_text("sh: python: not found\n")
    assert directory.has_key
    assert directory.printed(11) == " not found\n"
    directory.remove()
    directory.remove()
    assert list(tmp_path.iterdir()) == []
    assert not directory.has_key
    assert directory.printed(11) == ""


def test_key_file_that_others_could_read_is_refused(tmp_path):
    directory = RendezvousDirectory.create(tmp_path, CONTACT)
    directory.key_file.chmod(0o640)
    with pytest.raises(ValueError, match="must be a file of this user with mode 0600"):
        read_contact(directory.key_file)


def test_key_file_with_another_name_is_refused(tmp_path):
    directory = RendezvousDirectory.create(tmp_path, CONTACT)
    (tmp_path / "other").hardlink_to(directory.key_file)
    with pytest.raises(ValueError, match="and no other name"):
        read_contact(directory.key_file)


def test_key_file_of_another_user_is_refused(tmp_path, monkeypatch):
    directory = RendezvousDirectory.create(tmp_path, CONTACT)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="must be a file of this user"):
        read_contact(directory.key_file)


def test_link_to_a_key_file_is_refused(tmp_path):
    directory = RendezvousDirectory.create(tmp_path, CONTACT)
    link = tmp_path / "link"
    link.symlink_to(directory.key_file)
    with pytest.raises(OSError, match="symbolic"):
        read_contact(link)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{",
        '{"addresses": ["a"], "port": 1, "key": "00"}',
        '{"addresses": ["a"], "port": 65536, "key": "' + 64 * "0" + '"}',
        '{"addresses": 7, "port": 1, "key": "' + 64 * "0" + '"}',
        '{"port": 1, "key": "' + 64 * "x" + '"}',
    ],
)
def test_key_file_with_wrong_content_is_refused(tmp_path, content):
    directory = RendezvousDirectory.create(tmp_path, CONTACT)
    directory.key_file.write_text(content)
    with pytest.raises(ValueError, match=r"cannot be read|has no key"):
        read_contact(directory.key_file)
