-- Ends a started job because somebody asked for it, as RQ does: status stopped, in the failed registry, never retried.
--
-- KEYS     none: the keys depend on the job
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the worker's name
-- ARGV[3]  the queue's name
-- ARGV[4]  the job id
-- ARGV[5]  the execution id
-- ARGV[6]  base64 of the compressed reason
-- ARGV[7]  seconds to keep a failure where the job doesn't say
--
-- Returns 0: held no longer, nothing changed; 1: stopped, now or by the same call before.

local prefix, worker, queue, id, execution = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local key = prefix .. ':job:' .. id
if not holds(prefix, queue, id, execution) then
  return redis.call('HGET', key, 'status') == 'stopped' and 1 or 0
end

local created = redis.call('HGET', prefix .. ':execution:' .. id .. ':' .. execution, 'created_at') or clock()
local ttl = seconds(redis.call('HGET', key, 'failure_ttl'), tonumber(ARGV[7]))
-- RQ 3.0 has a result type of its own for stopped jobs, but writes that of failed ones.
close_job(prefix, queue, id, 'failed', ttl, timestamp(), {'type', 2, 'worker_name', worker, 'exc_string', ARGV[6],
  'execution_id', execution, 'execution_started_at', created, 'execution_ended_at', string.format('%.6f', clock())})
if redis.call('EXISTS', key) == 1 then
  redis.call('HSET', key, 'status', 'stopped')
  note_sequel(prefix, queue, id)
end
end_execution(prefix, queue, id, execution, worker)
count(prefix, worker, 'failed_job_count', 1)
return 1
