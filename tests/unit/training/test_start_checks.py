"""What a machine lacks for a run is told at its start."""

from peer_scale.training.start_checks import disk_shortage


def test_a_disk_without_room_for_two_checkpoints_is_one_line(mount_disk):
    folder = mount_disk("3m")
    fits = 3 * 2**20 // (2 * 12)
    assert disk_shortage(folder, fits) is None
    line = disk_shortage(folder, fits + 1)
    assert line == (
        f"--save {folder}: 3.0 MiB free, and a checkpoint takes 1.5 MiB: make room for 2, since a new one is written "
        "before an old one goes"
    )


def test_a_disk_that_does_not_tell_is_not_complained_of(tmp_path):
    assert disk_shortage(tmp_path / "gone", 10**15) is None
