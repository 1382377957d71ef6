"""The atelier.v1 contract: protos and the stubs generated from them by proto/generate.sh."""
