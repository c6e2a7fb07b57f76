"""Runs tests against the copy of the package in the working folder, in a process that has the host without the plugin.

    python tests/run_on_copy.py TEST ... [-x]

Writes outcome.json: the file that was imported, the tests that passed, the exceptions of the others, pytest's code.
"""

import json
import os
import sys

import pytest


class Outcome:
    def __init__(self):
        self.passed, self.failed, self.other = [], {}, []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            self.failed[item.nodeid] = [report.when, [c.__name__ for c in call.excinfo.type.__mro__]]
        elif report.skipped:
            self.other.append(item.nodeid)
        elif report.when == "call":
            self.passed.append(item.nodeid)
        return report

    def pytest_collectreport(self, report):
        if report.failed:
            self.other.append(report.nodeid)


if __name__ == "__main__":
    for name in [n for n in sys.modules if n.split(".")[0] == "solopo_plugin"]:
        del sys.modules[name]  # what the interpreter's start has imported
    sys.path.insert(0, os.getcwd())
    outcome = Outcome()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[outcome])
    import solopo_plugin.losses

    with open("outcome.json", "w") as file:
        json.dump(vars(outcome) | {"file": solopo_plugin.losses.__file__, "code": int(code)}, file)
