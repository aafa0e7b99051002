"""Combines manifest, model configuration and settings into how a version is loaded and run. Pure."""

from __future__ import annotations

import os
from typing import NamedTuple

import msgspec

from tether.domain.manifest import NO_FINDING, Batching, Finding, Manifest
from tether.model.config import COMPILED, InstanceKind, LoadBalancing, ModelConfig, Warmup
from tether.model.run_settings import effective_batching, effective_isolation
from tether.process.data_dir import Home
from tether.sandbox import plan
from tether.settings import Settings
from tether.worker.runtimes.process_runtime import Options


class LoadSpec(NamedTuple):
    """Everything that a load depends on; if it changes, the version is reloaded."""

    manifest: Manifest
    """The manifest with its isolation decided."""
    options: Options
    copies: int
    warmup: tuple[Warmup, ...]


class RunSpec(NamedTuple):
    """Everything that may change between runs without a reload."""

    batching: Batching
    preferred: tuple[int, ...]
    """Batch sizes in rows that need no further waiting; ascending."""
    delay_s: float
    """Seconds a worker waits to fill a batch; 0 unless configured, because gateways wait already."""
    run_timeout_s: float
    strategy: LoadBalancing


def load_spec(manifest: Manifest, config: ModelConfig, settings: Settings, finding: Finding = NO_FINDING) -> LoadSpec:
    """Return how to load a version."""
    compiled = config.compile and manifest.platform in COMPILED
    options = Options(
        threads=min(config.threads or settings.instance_threads, max(settings.instance_threads, os.cpu_count() or 1)),
        memory_mb=settings.model_memory_mb,
        run_memory_mb=settings.run_memory_mb,
        load_timeout_s=settings.load_timeout_s,
        device=settings.model_device if config.kind is InstanceKind.AUTO else config.kind.value,
        compile=compiled,
        warmup=config.warmup if compiled else (),
        confinement=settings.model_confinement,
        home=str(Home.at(settings.home).root),
        read_dirs=plan.read_dirs(settings.model_read_dirs),
        scratch_mb=settings.model_scratch_mb,
        behind=bool(finding.crashed),
    )
    isolation = effective_isolation(manifest, config, finding, rule=settings.onnx_isolation)
    as_loaded = msgspec.structs.replace(manifest, isolation=isolation.value)
    return LoadSpec(as_loaded, options, min(config.instances, settings.max_instances), config.warmup)


def run_spec(manifest: Manifest, config: ModelConfig, settings: Settings, finding: Finding = NO_FINDING) -> RunSpec:
    """Return how to run a loaded version."""
    batching = effective_batching(manifest, config, finding)
    limit = config.run_timeout_s or manifest.run_timeout_s or settings.run_timeout_s
    preferred = tuple(sorted(size for size in config.preferred_batch_sizes if size <= batching.max_batch_size))
    delay_s = (config.max_delay_ms or 0.0) / 1000 if batching.max_batch_size else 0.0
    return RunSpec(batching, preferred, delay_s, limit, config.load_balancing)
