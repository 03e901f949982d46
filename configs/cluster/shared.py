"""The address of an EFS file system by its name, for a node that mounts it: `shared.py REGION NAME`."""

import sys

import boto3

region, wanted = sys.argv[1:]
pages = boto3.client("efs", region_name=region).get_paginator("describe_file_systems").paginate()
found = [one["FileSystemId"] for page in pages for one in page["FileSystems"] if one.get("Name") == wanted]
if len(found) != 1:
    sys.exit(f"there are {len(found)} file systems named {wanted} in {region}, there must be one")
print(f"{found[0]}.efs.{region}.amazonaws.com")
