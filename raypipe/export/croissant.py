"""Croissant 1.0 (MLCommons): `croissant.json`, which tells loaders and search engines what a table of images holds."""

from __future__ import annotations

import pyarrow as pa

from raypipe.export.about import About

SPECIFICATION = "http://mlcommons.org/croissant/1.0"
TERMS = (
    "citeAs column equivalentProperty extract field fileObject fileProperty fileSet format includes isLiveDataset "
    "jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate separator source "
    "subField transform"
)
CONTEXT = {  # all terms of the specification: loaders complain about a context that lacks one
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
} | {term: f"cr:{term}" for term in TERMS.split()}
FILES, RECORDS = "parquet-files", "images"
TYPES = {"int32": "cr:Int32", "int64": "cr:Int64", "float": "cr:Float32", "halffloat": "cr:Float16"}
MEANING = {
    "image": "the photograph",
    "mask": "its label map; README.md says what the values mean",
    "segments": "its masks, exact: COCO run lengths and what is known of each",
    "key": "path of the image below the input",
}


def describe(columns: pa.Schema, about: About, *, pattern: str, picture: pa.DataType) -> dict:
    """The content of croissant.json for Parquet files with these columns.

    pattern: which files, relative. picture: the type of columns that hold pictures, a struct with `bytes`. It names the
    files by a pattern without checksums, as loaders read it: `mlcroissant.Dataset("croissant.json").records("images")`.
    """
    licence = about.licence or "not known"
    texts = f"Images with {about.text()}.", f"Licence of the method or its weights: {licence}."
    files = {"@type": "cr:FileSet", "@id": FILES, "name": FILES, "encodingFormat": "application/x-parquet"}
    fields = [_field(column, picture) for column in columns]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": SPECIFICATION,
        "name": f"masks_{about.method}",
        "description": " ".join([*texts, "The images keep that of their owners."]),
        "license": licence,
        "url": ".",
        "version": "1.0.0",
        "datePublished": about.provenance["time"],
        "distribution": [files | {"includes": pattern}],
        "recordSet": [{"@type": "cr:RecordSet", "@id": RECORDS, "name": RECORDS, "field": fields}],
    }


def _field(column: pa.Field, picture: pa.DataType) -> dict:
    """A column as a field; a list of structs as a repeated one, whose parts are taken from each of its structs."""
    found = {"@type": "cr:Field", "@id": f"{RECORDS}/{column.name}", "name": column.name}
    found |= {"description": MEANING[column.name]} if column.name in MEANING else {}
    if column.type == picture:
        return found | {"dataType": "sc:ImageObject"} | _source(column.name, "bytes")
    if not pa.types.is_list(column.type):
        return found | {"dataType": _type(column.type)} | _source(column.name)
    parts = []
    for part in column.type.value_type:
        name = f"{RECORDS}/{column.name}/{part.name}"
        inner = {"@type": "cr:Field", "@id": name, "name": part.name, "dataType": _type(part.type)}
        parts.append(inner | _source(column.name, part.name))
    return found | {"repeated": True, "subField": parts}


def _type(kind: pa.DataType) -> str:
    return TYPES.get(str(kind.value_type if pa.types.is_list(kind) else kind), "sc:Text")


def _source(column: str, part: str | None = None) -> dict:
    source = {"fileSet": {"@id": FILES}, "extract": {"column": column}}
    return {"source": source | ({} if part is None else {"transform": {"jsonPath": part}})}
