"""What a run compares before it begins or goes on."""

import pytest

from vicmae_hf.errors import InputError
from vicmae_hf.training import resuming


def test_processes_that_found_other_data_fail_alike(monkeypatch):
    found = [{"data": "4 names", "classes": "2 names"}, {"data": "1 names", "classes": "2 names"}]
    for own in found:
        monkeypatch.setattr(resuming, "gather_object", lambda data: found)
        message = r"^data: process 1 has found other items \(1 names\) than process 0 \(4 names\)\. Run again"
        with pytest.raises(InputError, match=message):
            resuming.check_same_in_all_processes(own)
    monkeypatch.setattr(resuming, "gather_object", lambda data: data + data)
    resuming.check_same_in_all_processes(found[0])
