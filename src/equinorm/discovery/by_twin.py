"""Discovery of a sharded model: by an unsharded twin on the meta device, to whose names its tensors are bound."""

import torch

from equinorm._errors import ExportError, describe
from equinorm.discovery.discover import Discovery, discover
from equinorm.discovery.graph.export import Graphs
from equinorm.modules.running import on_cpu
from equinorm.sharding.modules import on_meta, unsharded_twin


def discover_by_twin(graphs: Graphs, batch_norm: str, *, inner: bool = True) -> Discovery:
    """What holds for the whole of a sharded model; arguments are those of `discover`.

    Raises:
        ExportError: if the twin cannot be made or exported, or there are opaque modules.
    """
    model = graphs.model
    if graphs.opaque:
        raise ExportError(
            f"{describe(model)} is sharded, and what opaque modules ({', '.join(graphs.opaque)}) return could only be seen by "
            "running it whole. Analyse and balance the model before it is sharded."
        )
    twin, inputs = unsharded_twin(model), [(on_meta(args), on_meta(kwargs)) for args, kwargs in graphs.calls]
    try:
        with torch.device("meta"):  # for what a forward makes by itself
            return on_cpu()(discover)(Graphs(twin, inputs, graphs.modes, {}), batch_norm, inner=inner)
    except ExportError as error:
        way = "Sharded models are analysed as a whole, on the meta device: sizes in their code must not be those of a part."
        error.args = (f"{error} {way}",)
        raise
