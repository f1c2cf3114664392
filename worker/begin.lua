-- Notes on the executions of jobs that were tried before that they begin now, with what each job fails with should the
-- worker die of it. Without this note such a job goes back as if it had not been claimed; see recover.lua.
--
-- KEYS     none: the keys depend on the jobs
-- ARGV[1]  RQ's key prefix
-- then     queue name, job id, execution id, base64 of the compressed reason for each job
--
-- Returns the places (1, 2, ...) of the jobs that this worker no longer holds.

local prefix = ARGV[1]
local lost = {}
for i = 2, #ARGV, 4 do
  local queue, id, execution = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if holds(prefix, queue, id, execution) then
    local record = prefix .. ':execution:' .. id .. ':' .. execution
    local reply = redis.pcall('HSET', record, 'begun', ARGV[i + 3])
    if is_error(reply) then
      drop_other_type(record, reply)
      redis.call('HSET', record, 'begun', ARGV[i + 3])
    end
  else
    lost[#lost + 1] = (i + 2) / 4
  end
end
return lost
