"""A stop notice to a rank: by signal, or written by another process."""

import os
import signal

from stages.training.faults import StopNotice, write_notice


def test_a_rank_gets_a_notice_that_is_written_after_it_opened_its_own(tmp_path):
    write_notice(tmp_path, 1, "too early\n")
    notice = StopNotice(tmp_path, 1)
    assert not notice.given()  # it may be for an earlier training; whoever writes notices repeats them
    write_notice(tmp_path, 0, "another rank's\n")
    assert not notice.given()
    write_notice(tmp_path, 1, "Ray: node n1 will be taken away\n")
    assert notice.given()
    notice.close()


def test_sigterm_is_a_notice_and_leaves_the_stacks(tmp_path):
    notice = StopNotice(tmp_path, 0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert notice.given()
    notice.close()
    assert "test_stop_notice.py" in (tmp_path / "stop-notice-0.txt").read_text()
