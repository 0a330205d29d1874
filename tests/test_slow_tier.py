"""The slow tests have been green not long ago: tests that are not run rot."""

import subprocess

import pytest

from tests.slow_tier import MOST_COMMITS, ROOT, git, last_green


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone: an archive has no commits to count")
def test_slow_tests_were_green_a_few_commits_ago() -> None:
    commit = last_green()["commit"]
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except subprocess.CalledProcessError:
        assert git("rev-parse", "--is-shallow-repository").strip() == "true", f"{commit} is no commit of this history"
        return  # cloned without its history
    since = int(git("rev-list", "--count", f"{commit}..HEAD"))
    assert since <= MOST_COMMITS, f"{since} commits since the slow tests were green: run python -m tests.slow_tier"
