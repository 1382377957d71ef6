"""Who asked, in what order, how it ends: the gRPC service that joins the catalog and composition."""
