PIPE_DESCRIPTORS: int

class Pipes:
    def allow(self) -> None: ...
