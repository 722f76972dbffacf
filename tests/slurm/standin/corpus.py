"""Stand-in for ``scaling.data.corpus`` in the processes of test jobs."""


class Corpus:
    @classmethod
    def find(cls, root, digest):
        return digest
