-- Gives claimed jobs back to the head of their queues, in the order in which they were claimed.
--
-- KEYS     none: the keys depend on the jobs
-- ARGV[1]  RQ's key prefix
-- ARGV[2]  the worker's name
-- then     queue name, job id, execution id for each job, in the order of the claim
--
-- Returns the places (1, 2, ...) of those that were given back; those no longer held are left alone.

local prefix, worker = ARGV[1], ARGV[2]
local released, is_clear = {}, {}
for i = #ARGV - 2, 3, -3 do
  local queue, id, execution = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if not is_clear[queue] then
    clear_way_for_end(prefix, queue)
    is_clear[queue] = true
  end
  local is_held = holds(prefix, queue, id, execution)
  -- First, since a full server refuses a script that begins with a write which may take memory, and no other.
  end_execution(prefix, queue, id, execution, worker)
  if is_held then
    put_back(prefix, queue, id, 'LPUSH')
    released[#released + 1] = i / 3
  end
end
return released
