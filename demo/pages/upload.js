// @ts-check
"use strict";
// The stand-in's upload by hand, in the form of a script that Next.js has made: each action of the server stands beside
// its name, unless the deployment leaves the names out.

(() => {
  /** @param {string} id @param {string[]} values @returns {Promise<any>} what the action gives */
  async function callServer(id, values) {
    const headers = { Accept: "text/x-component", "Next-Action": id };
    const response = await fetch(location.href, { method: "POST", headers, body: JSON.stringify(values) });
    const row = (await response.text()).split("\n").find((line) => line.startsWith("1:"));
    if (!response.ok || !row) throw new Error(`status ${response.status}`);
    return JSON.parse(row.slice(2)).data;
  }

  const a = {
    /** @param {string} id @param {typeof callServer} call @param {...unknown} _rest @returns {(...values: string[]) => Promise<any>} */
    createServerReference: (id, call, ..._rest) => (...values) => call(id, values),
  };
  const b = { callServer };
  const c = { findSourceMapURL: undefined };
  const place = (0,a.createServerReference)("{{PUT_ACTION}}",b.callServer,void 0,c.findSourceMapURL,"{{PUT_NAME}}");
  const address = (0,a.createServerReference)("{{GET_ACTION}}",b.callServer,void 0,c.findSourceMapURL,"{{GET_NAME}}");

  const input = Object.assign(document.createElement("input"), { type: "file", id: "file" });
  const shown = Object.assign(document.createElement("output"), { id: "uploaded" });
  document.body.append(input, shown);
  input.addEventListener("change", async () => {
    const file = /** @type {File} */ (input.files?.[0]);
    try {
      const { uploadUrl, key } = await place(file.name, file.type);
      await fetch(uploadUrl, { method: "PUT", headers: { "Content-Type": file.type }, body: file, credentials: "omit" });
      shown.textContent = (await address(key)).url;
    } catch (error) {
      shown.textContent = String(error);
    }
  });
})();
