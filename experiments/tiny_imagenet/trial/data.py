"""``data.py ARCHIVES DATA``: check and unpack the archives that are there, in parallel; says which."""
import concurrent.futures, hashlib, io, sys, tarfile
from pathlib import Path

SUMS = {
    "train_1": ("22fbf9ffb0fa0e038151cbb52be4b1f7f193a5044323bb2bd49109298236f542", 30000),
    "train_2": ("c2253d275d9d95165e7dd8d63e4f18928b698acfbbe27294550190c74712908b", 30000),
    "val": ("750c655d6ef89801e132ec4e5f00a5ac815572c43c6dd393ec9b60815e2fa4ab", 8000),
}

def unpack(path: Path, to: Path) -> str:
    name = path.name.removeprefix("tiny_imagenet_").removesuffix(".tar.xz")
    done = to / f"{name}.complete"
    if done.exists():
        return f"{name} there"
    content = path.read_bytes()
    digest, expected = SUMS[name]
    assert hashlib.sha256(content).hexdigest() == digest, f"{name} is damaged"
    count = 0
    with tarfile.open(fileobj=io.BytesIO(content), mode="r|xz") as archive:
        for member in archive:
            if member.isfile():
                archive.extract(member, to, filter="data")
                count += 1
    assert count == expected, (name, count)
    done.touch()
    return f"{name} {count}"

if __name__ == "__main__":
    archives, to = sorted(Path(sys.argv[1]).glob("tiny_imagenet_*.tar.xz")), Path(sys.argv[2])
    to.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor(3) as pool:
        print(*pool.map(unpack, archives, [to] * len(archives)), sep=", ")
