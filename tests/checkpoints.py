"""Checkpoints as orbax itself reads them."""

import orbax.checkpoint as ocp


def final_state(workdir):
    """params, EMA and optimizer state of a run's last checkpoint."""
    names = ("params", "ema", "opt_state")
    manager = ocp.CheckpointManager(
        workdir / "checkpoints", item_names=(*names, "meta"), options=ocp.CheckpointManagerOptions(read_only=True)
    )
    items = {name: ocp.args.StandardRestore() for name in names}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**items))
    return [restored[name] for name in names]
