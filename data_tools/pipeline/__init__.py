"""`prefopt data build`: from prompts to a data set, by a pipeline of stages over groups. See docs/data.md.

config      the pipeline file: what is in it, bound to functions and checked against their signatures
provenance  which prompt a record comes from, and which split that puts it in
cache       shards on disk by content, and what a stage made of each
identity    what decides a stage's output: settings, code, content of the files and folders it names
driver      stage after stage, shard after shard, resumed where it was stopped
"""
