"""Publishing to and pulling from the Hugging Face Hub: the only code that imports huggingface_hub.

    endpoint   which Hubs there are, and whose token is whose
    wire       a call's time, kept by the connection under it
    guard      what every HTTP request passes: allowed hosts, limits, what may be tried again
    answers    what its refusals become
    client     the calls, each of which ends, tells what it did, and believes nothing it has not checked
    card       a version's card as the Hub shows it
    files      a version's files in a repository, here and there
    state      which asset is which repository, and what both held when they were last the same
    push pull sync

One asset is one repository. Version 3 is the commit tagged `v3`, the newest is the head of `main`.
"""
