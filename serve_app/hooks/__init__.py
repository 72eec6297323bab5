"""What other programs load of ours: vLLM, PyTorch, Ray Serve's proxy. And what is changed there, with vLLM 0.32.0.

Each row has a test in ``tests/contracts`` (``test_seams.py`` says which). The table of the ingress is in
``serve_app/ingress/seams.py``.

Stage replicas, their engine and worker processes:

==============================================  =========================================  ============================
What, and by what                               Why                                        Until
==============================================  =========================================  ============================
threading.excepthook                            An engine whose NIXL cannot listen would   vLLM ends such an engine.
  vllm_plugin.py _die_with_nixl_listener        wait for ever, and Serve for its replica.
logging.getLogger("vllm"), excepthook           A replica says why its engine does not     vLLM hands the exception on.
  start_failure.py tell_replica                 start; vLLM only logs it.
vllm.utils.network_utils.tempfile               An engine that is killed leaves the file   vLLM asks where to put it.
  vllm_plugin.py _process_group_meets_in        of PyTorch's process group.
nixl_agent_config.__init__                      Its progress thread burns a core or two    NIXL takes its delay; 1.5.1
  vllm_plugin.py _still_nixl_progress_thread    of an idle engine on the CPU.              does not.
OutputProcessor.process_outputs                 Raw outputs go to the ingress; no replica  AsyncLLM gives them out.
  stages/tap.py install_tap                     makes text of them.
vllm.envs.VLLM_MAX_…, Image.MAX_IMAGE_PIXELS    Encoders decode media. See the ingress.    Stays: settings.
  media/check.py install_limits
WorkerBase                                      A replica asks its workers about leases    vLLM takes several
  transfer/kv_lease.py answer_replica           by `collective_rpc`;                       extensions.
                                                `worker_extension_cls` is the user's.
NixlPullConnector, NixlPushConnector            Decode uses KV blocks that were surely     vLLM checks the lease after
  transfer/kv_lease.py, kv_transport.py         held, of its own version, and says so      a pull.
                                                where they crawl.
ECCPUConnector                                  An encoder names only what can be read,    vLLM does both.
  transfer/ec_nixl.py                           and no file outlives it.
ECConnectorBase                                 Embeddings in a shared folder.             Stays: vLLM's extension
  transfer/ec_connector.py                                                                 point.
torch.ops.torchvision, torchaudio, torchcodec   Compiled for CUDA, they cannot be          PyPI has builds for the CPU.
  torch_backend.py register                     imported beside a PyTorch without it.
==============================================  =========================================  ============================

Serve's proxy:

==============================================  =========================================  ============================
What, and by what                               Why                                        Until
==============================================  =========================================  ============================
Serve's HTTP proxy                              A request whose ingress dies before it     Stays: Serve's extension
  proxy.py middlewares;                         answers is asked again.                    point.
  RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
==============================================  =========================================  ============================
"""
