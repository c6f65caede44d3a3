"""Runs rdma-core's own tests, and prints what came of each as one line of JSON.

usage: pyverbs_suite.py TESTS OPTION...: the directory of the tests, and options of theirs
"""

import json
import os
import sys
import unittest


class Outcomes(unittest.TestResult):
    """What came of each test: a word, and the reason."""

    def __init__(self):
        super().__init__()
        self.outcomes = {}

    def note(self, test, outcome, reason):
        # A part that failed is what the whole came to.
        self.outcomes.setdefault(test.id(), (outcome, reason))

    def addSuccess(self, test):
        self.note(test, "ok", "")

    def addFailure(self, test, err):
        self.note(test, "failed", self._exc_info_to_string(err, test))

    def addError(self, test, err):
        self.note(test, "failed", self._exc_info_to_string(err, test))

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addError(test, err)

    def addSkip(self, test, reason):
        self.note(test, "skipped", reason)

    def addExpectedFailure(self, test, err):
        self.addSuccess(test)

    def addUnexpectedSuccess(self, test):
        self.note(test, "failed", "it succeeded")


def main():
    directory = sys.argv[1]
    sys.argv[1:] = sys.argv[2:]
    sys.path[:0] = [directory, os.path.dirname(directory)]
    from args_parser import parser

    parser.parse_args()
    import tests

    result = Outcomes()
    unittest.defaultTestLoader.loadTestsFromModule(tests).run(result)
    sys.stdout.flush()
    print("\noutcomes " + json.dumps(result.outcomes), flush=True)


main()
