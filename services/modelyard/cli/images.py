"""modelyard images …"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .guard import fail, usage
from .options import (
    Base,
    Description,
    ImageRef,
    Limit,
    Output,
    Properties,
    TagChanges,
    Tags,
    Wait,
    Where,
    changed_tags,
    command,
    connect,
    group,
    names,
    pairs,
)
from .show import Column, Format, Steps, document, documents, size
from .signature import described

if TYPE_CHECKING:
    from ..client import Client, Image

app = group("Build images from models, look into them, delete them.")
Own = Annotated[Path | None, typer.Option(
    exists=True, metavar="FOLDER", help="A folder with a Dockerfile (or that file alone) to stand on, in place of "
                                        "--base: the yard's Docker Engine builds it.")]
Gone = Annotated[bool | None, typer.Option(
    "--auto-delete/--no-auto-delete", help="Whether it goes with the last deployment that needs it; no unless said.")]
Form = Literal["context", "oci", "docker"]
COLUMNS: list[Column] = ["id", "phase", "models", "tags", "created"]


def built(yard: Client, image: Image, steps: Steps) -> Image:
    """The image once it is ready; its log's last lines where the build failed."""
    from ..core.errors import BuildFailed

    try:
        return image.wait(on_progress=steps)
    except BuildFailed as exc:
        if exc.code == "cancelled":  # its log went with it
            raise
        steps.done(f"{image.id} failed; its log ends with")
        for line in image.log().splitlines()[-12:]:
            print(f"  {line}", file=sys.stderr)
        raise


@command(app, "build", """
modelyard images build iris-scorer --model iris:4 --score score.py -r requirements.txt
modelyard images build iris-scorer --model iris:4 --dockerfile ./system""")
def build(
    name: Annotated[str, typer.Argument(help="The image's name; the builder gives the version.")],
    model: Annotated[list[str] | None, typer.Option(
        "--model", "-m", help="iris:4, iris or iris@champion; repeat for more.",
        autocompletion=names("models"))] = None,
    score: Annotated[Path | None, typer.Option(exists=True, help="score.py, or a folder with one.")] = None,
    requirements: Annotated[str | None, typer.Option(
        "--requirements", "-r", metavar="FILE", help="requirements.txt, pyproject.toml, pyproject.toml[EXTRA] or "
                                                     "environment.yml.")] = None,
    require: Annotated[list[str] | None, typer.Option(help="One requirement: scikit-learn==1.9.1.")] = None,
    lock: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A lock to use as it is.")] = None,
    python: Annotated[str | None, typer.Option(help="For example 3.11.")] = None,
    platform: Annotated[str | None, typer.Option(help="linux/amd64 or linux/arm64.")] = None,
    base: Base = None, dockerfile: Own = None,
    env: Annotated[list[str] | None, typer.Option(metavar="K=V", help="Public environment, baked in.")] = None,
    time_limit: Annotated[int | None, typer.Option(
        min=1, metavar="SECONDS", help="A build that takes longer fails: 1800 unless said otherwise.")] = None,
    onnx: Annotated[bool, typer.Option(
        "--onnx/--no-onnx", help="Serve small scikit-learn models as ONNX, where that answers the same on their "
                                 "samples and rows about them; the log says which, and why not.")] = False,
    tag: Tags = None, property: Properties = None, description: Description = None, auto_delete: Gone = None,
    wait: Wait = True, output: Output = Format.table,
) -> None:
    """Builds the next version of an image."""
    from dataclasses import replace

    from ..client.requirements import read_requirements

    needs = read_requirements(requirements)
    needs = replace(needs, requirements=[*(needs.requirements or []), *(require or [])] or None)
    with connect() as yard, Steps() as steps:
        steps.start(f"building {name}")
        image = yard.images.build(
            name, models=model or [], score=score, requirements=needs, lock=lock, python=python,
            platform=platform, base=base, dockerfile=dockerfile, env=pairs(env, "--env"), tags=pairs(tag, "--tag"),
            properties=pairs(property, "--property"), description=description, auto_delete=auto_delete,
            timeout_s=time_limit, onnx=onnx or None, on_progress=steps)
        if wait:
            image = built(yard, image, steps)
        steps.done(f"image {image.id} is {image.phase}")
    document(image.document, output, "Image")


@command(app, "list", "modelyard images list --model iris:4")
def list_(
    name: Annotated[str | None, typer.Option(help="Only of this name.")] = None,
    model: Annotated[str | None, typer.Option(help="Only with this model: iris:4, or iris for all versions.")] = None,
    digest: Annotated[str | None, typer.Option(help="Only of this digest, whole: sha256:….")] = None,
    tag: Where = None, limit: Limit = None, output: Output = Format.table,
) -> None:
    """Images, the newest first."""
    with connect() as yard:
        found = yard.images.list(name=name, model=model, digest=digest, tags=tag, limit=limit)
    documents([i.document for i in found], COLUMNS, output, "Image")


@command(app, "show", "modelyard images show iris-scorer")
def show(image: ImageRef, output: Output = Format.table) -> None:
    """One version, in full: what its models take and give as well, and a line to try it."""
    with connect() as yard:
        found = yard.images.get(image)
        running = yard.deployments.list(image=found.id, limit=1) if found.samples and output is Format.table else []
    if output is not Format.table:
        document(found.document, output, "Image")
        return
    document({k: v for k, v in found.document.items() if k not in ("signatures", "samples")}, output)
    for line in described(found.document, *(service.name for service in running)):
        print(line)


@command(app, "tag", "modelyard images tag iris-scorer:7 stage=trial old-")
def tag(image: ImageRef, tags: TagChanges, output: Output = Format.table) -> None:
    """Sets tags and takes them away."""
    with connect() as yard:
        document(yard.images.update(image, tags=changed_tags(tags)).document, output, "Image")


@command(app, "update", "modelyard images update iris-scorer:7 --property reviewed=yes --auto-delete")
def update(image: ImageRef, tag: Tags = None, property: Properties = None, description: Description = None,
           auto_delete: Gone = None, output: Output = Format.table) -> None:
    """Sets tags, the description and auto_delete, adds properties (never changes one)."""
    with connect() as yard:
        changed = yard.images.update(
            image, tags=changed_tags(tag), properties=pairs(property, "--property"), description=description,
            auto_delete=auto_delete)
        document(changed.document, output, "Image")


@command(app, "wait", "modelyard images wait iris-scorer:7 --timeout 600")
def wait(
    image: ImageRef, timeout: Annotated[float | None, typer.Option(
        min=0, metavar="SECONDS", help="At most so long. Otherwise until its turn comes, and then as long as the build "
                                       "may take (timeout_s of the image) and a minute.")] = None,
    output: Output = Format.table,
) -> None:
    """Waits until the build is over; exit 1 if it failed."""
    with connect() as yard, Steps() as steps:
        steps.start(f"waiting for {image}")
        found = yard.images.get(image).wait(timeout, on_progress=steps)
    document(found.document, output, "Image")


@command(app, "log", "modelyard images log iris-scorer:7 --follow")
def log(
    image: ImageRef, follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the build is over.")] = False,
) -> None:
    """The build log."""
    with connect() as yard:
        for line in yard.images.log(image, follow=follow):
            print(line, flush=follow)


@command(app, "export", """
modelyard images export iris-scorer:7 --docker iris.tar && docker load --input iris.tar
modelyard images export iris-scorer:7 --oci iris.tar
modelyard images export iris-scorer:7 --to context.tar""")
def export(
    image: ImageRef,
    to: Annotated[Path | None, typer.Option(dir_okay=False, help="Build context, with a Dockerfile: where.")] = None,
    oci: Annotated[Path | None, typer.Option(dir_okay=False, help="OCI layout in a tar: where.")] = None,
    docker: Annotated[Path | None, typer.Option(dir_okay=False, help="Tar for docker load: where.")] = None,
) -> None:
    """Writes an image, or all that it was made from, as a tar; prints where."""
    given: dict[Form, Path | None] = {"context": to, "oci": oci, "docker": docker}
    wanted = [(form, path) for form, path in given.items() if path is not None]
    if len(wanted) > 1:
        usage("give one of --to, --oci and --docker")
    form, place = wanted[0] if wanted else ("context", Path(f"{image.replace(':', '-')}.tar"))
    with connect() as yard, Steps() as steps:
        steps.start(f"exporting {image}")
        found = yard.images.get(image)
        print(yard.images.export(found.id, place, form=form, on_progress=steps))
    if form == "context" and not (found.document.get("base") or found.document.get("dockerfile")):
        print(f"note: {found.id} has no base, so what its Dockerfile stands on (FROM) is a guess: put your own there, "
              "or build the image with --base", file=sys.stderr)


@command(app, "sbom", "modelyard images sbom iris-scorer:7 > iris.cdx.json")
def sbom(image: ImageRef) -> None:
    """The bill of materials, as it was signed for: CycloneDX 1.6 JSON."""
    _printed(image, "sbom")


@command(app, "provenance", "modelyard images provenance iris-scorer:7 > iris.dsse.json")
def provenance(image: ImageRef) -> None:
    """Where the image comes from: SLSA v1 in a signed DSSE envelope."""
    _printed(image, "provenance")


@command(app, "lock", "modelyard images lock iris-scorer:7 > requirements.lock")
def lock(image: ImageRef) -> None:
    """Every package with its version and hashes, as pip reads it; `images build --lock` takes it."""
    _printed(image, "lock")


def _printed(image: str, what: Literal["sbom", "provenance", "lock"]) -> None:
    """Its bytes, and nothing added: others hash them."""
    with connect() as yard:
        sys.stdout.buffer.write(yard.images.kept(image, what))


@command(app, "key", "modelyard images key > yard.pub")
def key(output: Output = Format.table) -> None:
    """The public key that this yard signs its images with: keep it where you verify them."""
    with connect() as yard:
        found = yard.images.key()
    print(found["pem"], end="") if output is Format.table else document(found, output)


@command(app, "verify", "modelyard images verify iris-scorer:7 --key yard.pub")
def verify(
    image: ImageRef,
    key: Annotated[Path | None, typer.Option(
        exists=True, dir_okay=False, help="Public keys to trust; absent, the yard's own is asked for.")] = None,
    output: Output = Format.table,
) -> None:
    """Checks an image against its signed provenance, line by line; exit 1 if anything is wrong."""
    with connect() as yard:
        found = yard.images.verify(image, key)
    if output is not Format.table:
        document(found.document, output)
    else:
        for finding in found.findings:
            print(f"{'ok' if finding.ok else 'WRONG':<5}  {finding.what:<9}  {finding.message}")
    if not found.ok:
        wrong = sum(not finding.ok for finding in found.findings)
        fail(f"{found.image} is not what it says: {wrong} of {len(found.findings)} findings are wrong")


@command(app, "base", """
modelyard images base --debian
modelyard images base --debian --suite trixie --package libgomp1 --to /srv/bases/trixie""")
def base(
    debian: Annotated[bool, typer.Option("--debian", help="Debian with its own Python, of Debian's packages.")] = False,
    to: Annotated[Path | None, typer.Option(
        help="The folder to make, an OCI layout; none: ./debian-SUITE.")] = None,
    suite: Annotated[str, typer.Option(help="Debian's release, bookworm (Python 3.11) or newer.")] = "bookworm",
    package: Annotated[list[str] | None, typer.Option(
        help="One more of Debian's packages, in a layer of its own with the others; repeat for more.")] = None,
    mirror: Annotated[str | None, typer.Option(
        metavar="URL", help="Where the packages are; the image's apt will name it. None: where the tool finds them, "
                            "and the image names no mirror.")] = None,
) -> None:
    """Makes a base on this machine, where none can be pulled, by mmdebstrap or debootstrap; prints what --base takes.
    It needs root, or mmdebstrap and uidmap. The same packages and SOURCE_DATE_EPOCH give the same image."""
    from .debian import Recipe, make

    if not debian:
        usage("say what of: --debian is what can be made here")
    recipe = Recipe(suite, tuple(package or ()), mirror)
    with Steps() as steps:
        steps.start(f"making Debian {suite}")
        made = make(to or Path(f"debian-{suite}"), recipe, steps.doing)
        steps.done(f"Debian {suite} with Python {made.python}, {size(made.size)}")
    print(made.reference)


@command(app, "delete", "modelyard images delete iris-scorer:7")
def delete(image: ImageRef) -> None:
    """Deletes one version; refused while a deployment needs it."""
    with connect() as yard:
        yard.images.delete(image)
    print(f"{image} is gone")
