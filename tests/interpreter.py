"""Triton's interpreter, faster: its language is prepared once a launch, not at every call of a device function.

Before it runs a kernel, Triton replaces the functions of `triton.language` by ones that compute with NumPy. It does so
again at each call from one `@triton.jit` function to another, which changes nothing and takes a third of the time of
our tests of kernels. It also builds its table of NumPy's types anew for every value that it makes.
"""

from typing import Any

from triton.runtime import interpreter


def speed_up() -> None:
    """Prepare each module's view of the language once a launch, in all tests of this process."""
    prepare, prepared = interpreter._patch_lang, set[int]()

    def once(fn: Any) -> Any:
        """What a launch is to restore in its end; nothing is restored after calls within it."""
        if id(fn.__globals__) in prepared:
            return None
        prepared.add(id(fn.__globals__))
        scope = prepare(fn)
        put_back = scope.restore

        def restore() -> None:
            put_back()
            prepared.clear()

        scope.restore = restore
        return scope

    find, found = interpreter._get_np_dtype, dict[str, Any]()

    def look_up(kind: Any) -> Any:
        """The type in NumPy of a type of Triton's; that of a block is that of its elements."""
        name = kind.scalar.name
        if name not in found:
            found[name] = find(kind.scalar)
        return found[name]

    interpreter._patch_lang, interpreter._get_np_dtype = once, look_up
