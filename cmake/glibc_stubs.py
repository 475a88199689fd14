"""Stubs of glibc's libraries that offer the versions of an older release, for the linker alone.

    python cmake/glibc_stubs.py FOLDER 2.28 COMPILER

glibc keeps an old version of a symbol when it adds a new one: pow@GLIBC_2.2.5 beside pow@GLIBC_2.29. The linker takes
the newest, and the library no longer loads on older systems. The stubs in FOLDER have the newest version up to 2.28 of
every such symbol and come before glibc on the linker's command line. Their paths are printed, one a line; none are
where glibc itself is that old.
"""

import platform
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# Until release 2.34 these were libraries of their own; their files still exist.
HOMES = (
    (r"dl", "libdl.so.2"),
    (r"(pthread|sem|thrd|mtx|cnd|tss)_", "libpthread.so.0"),
    (r"(shm|mq|timer|aio)_", "librt.so.1"),
)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def old_versions(library: str, newest: str) -> dict[str, str]:
    """Symbols whose default version is newer than ``newest``, with their newest version that is not."""
    versions = defaultdict(list)
    defaults = {}
    symbols = run("nm", "-D", library)
    for name, default, version in re.findall(r" [TWi] (\w+)@(@?)GLIBC_([0-9.]+)$", symbols, re.MULTILINE):
        versions[name].append(version)
        if default:
            defaults[name] = version
    found = {}
    for name, default in defaults.items():
        old = [version for version in versions[name] if release(version) <= release(newest)]
        if release(default) > release(newest) and old:
            found[name] = max(old, key=release)
    return found


def write_stub(folder: Path, soname: str, symbols: dict[str, str], compiler: str) -> str:
    stub = folder / f"stub_{soname}"
    lines = [".section .note.GNU-stack"] if symbols else []
    lines += [".text", *(f".globl {name}\n.type {name}, %function\n{name}:" for name in symbols)]
    source = folder / f"{soname}.s"
    source.write_text("\n".join(lines) + "\n")
    nodes = defaultdict(list)
    for name, version in symbols.items():
        nodes[version].append(name)
    script = folder / f"{soname}.map"
    script.write_text("".join(f"GLIBC_{version} {{ {'; '.join(names)}; }};\n" for version, names in nodes.items()))
    options = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script={script}"]
    run(compiler, *options, "-o", str(stub), str(source))
    return stub.as_posix()


def main(folder: Path, newest: str, compiler: str) -> None:
    if release(platform.libc_ver()[1]) <= release(newest):
        return
    folder.mkdir(parents=True, exist_ok=True)
    homes = defaultdict(dict)
    for library in ("libc.so.6", "libm.so.6"):
        path = run(compiler, f"-print-file-name={library}").strip()
        for name, version in old_versions(path, newest).items():
            home = next((home for pattern, home in HOMES if re.match(pattern, name)), library)
            homes[home][name] = version
    for soname, symbols in sorted(homes.items()):
        print(write_stub(folder, soname, symbols, compiler))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
