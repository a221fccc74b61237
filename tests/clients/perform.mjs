// What the scripts beside it share. A script gets `{"url": ..., "calls": {name: {"do": ..., ...}}}` on
// standard input, performs the calls one after another and prints one JSON object: by name, what the client
// saw of each call, or `{"error": ...}` for what it threw.

import { text } from "node:stream/consumers";

export async function perform(connect, doers, describe) {
  const { url, calls } = JSON.parse(await text(process.stdin));
  const client = connect(url);
  const seen = {};
  for (const [name, { do: what, ...given }] of Object.entries(calls)) {
    try {
      seen[name] = await doers[what](client, given);
    } catch (error) {
      seen[name] = { error: describe(error) };
    }
  }
  process.stdout.write(JSON.stringify(seen));
}

// A picture's first bytes and its size: enough to know it again.
export function picture(base64) {
  const bytes = Buffer.from(base64, "base64");
  return { is_png: bytes.subarray(1, 4).toString() === "PNG", bytes: bytes.length, base64 };
}
