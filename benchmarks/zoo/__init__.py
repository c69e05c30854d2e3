"""Every model of torchvision, timm and transformers: exported, looked at, moved. Run `python benchmarks/zoo`."""
