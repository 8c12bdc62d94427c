// Of a node that fails while it runs the page says only that it failed, and keeps the reason for another panel. This
// shows the sentence of our nodes.
import { app } from "../../../scripts/app.js";

const OURS = "longcat_core.errors.";
const SECONDS = 30;

app.registerExtension({
  name: "longcatvideo.Errors",
  setup() {
    app.api.addEventListener("execution_error", ({ detail }) => {
      if (!detail?.exception_type?.startsWith(OURS)) return;
      const node = app.graph?.getNodeById?.(detail.node_id);
      app.extensionManager?.toast?.add({
        severity: "error",
        summary: node?.title ?? detail.node_type,
        detail: detail.exception_message.trim(),
        life: 1000 * SECONDS,
      });
    });
  },
});
